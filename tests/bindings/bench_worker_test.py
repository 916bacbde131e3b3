"""What ./kata bench --against torch starts, on small problems of every kind: right answers are timed, wrong ones are not.

    python3 tests/bindings/bench_worker_test.py --library build/solutions/bindings/libflashkata.so

On a library for the virtual GPU the kernels' times mean nothing, but their answers are compared.
"""

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "against_torch"))
import bench_worker  # noqa: E402

LIBRARY = sys.argv.pop(sys.argv.index("--library") + 1)
sys.argv.remove("--library")
steps = bench_worker.start(LIBRARY)

PLAIN = {"step": "0.00", "type": "float32", "direction": "forward", "what": "", "gpu": True, "causal": False, "batch": 1,
         "heads": 2, "kv_heads": 2, "queries": 128, "length": 128, "width": 64, "threads": 0, "packed": False, "groups": [],
         "dropout": 0.0, "window": [], "page": 0, "seconds": 0.001}
SEQUENCES = [[0, 50, 0, 50], [50, 51, 50, 51], [51, 128, 51, 128]]
CHUNKS = [[0, 64, 0, 64], [64, 128, 0, 128]]
DECODE = {"direction": "decode", "queries": 1, "length": 512, "heads": 8, "kv_heads": 2, "batch": 2}

# What is asked: of the kernels, and in float32 of the CPU too.
KINDS = {
    "whole tensors": {"batch": 2},
    "packed": {"packed": True, "groups": SEQUENCES},
    "shared heads": {"heads": 4, "kv_heads": 1},
    "dropout": {"dropout": 0.2},
    "a window behind": {"window": [31, 0]},
    "a window on both sides": {"window": [16, 16]},
    "in 16 bits": {"type": "bfloat16", "batch": 2},
    "groups": {"type": "bfloat16", "groups": CHUNKS, "heads": 4},
    "decoding": DECODE,
    "decoding in pages": {**DECODE, "page": 16, "type": "float16"},
}


class Worker(unittest.TestCase):
    def ask(self, **changes):
        return bench_worker.answer({**PLAIN, **changes})

    def test_right_answers_are_timed(self):
        for name, kind in KINDS.items():
            for gpu in (True, False) if kind.get("type", "float32") == "float32" else (True,):
                for direction in ("decode",) if "direction" in kind else ("forward", "backward"):
                    for causal in (False, True) if direction != "decode" else (False,):
                        with self.subTest(name, gpu=gpu, direction=direction, causal=causal):
                            result = self.ask(**{**kind, "gpu": gpu, "direction": direction, "causal": causal})
                            self.assertEqual(result["status"], "ok", result.get("why"))
                            self.assertGreater(result["times"]["ours"]["median"], 0)

    def test_wrong_answers_are_not(self):
        forward, backward, decode = bench_worker.operators._forward, bench_worker.operators._backward, bench_worker.flashkata.decode

        def spoilt(function, number):
            def call(*arguments, **options):
                results = function(*arguments, **options)
                (results[number] if isinstance(results, tuple) else results)[..., -1] += 0.5
                return results

            return call

        try:
            for name, kind in KINDS.items():
                if "direction" in kind:
                    bench_worker.flashkata.decode = spoilt(decode, 0)
                    self.assertEqual(self.ask(**kind)["status"], "wrong", name)
                    continue
                bench_worker.operators._forward = spoilt(forward, 0)
                self.assertEqual(self.ask(**kind)["status"], "wrong", name)
                bench_worker.operators._forward = forward
                for number in range(3):
                    bench_worker.operators._backward = spoilt(backward, number)
                    self.assertEqual(self.ask(**{**kind, "direction": "backward"})["status"], "wrong", (name, number))
                bench_worker.operators._backward = backward
        finally:
            bench_worker.operators._forward, bench_worker.operators._backward = forward, backward
            bench_worker.flashkata.decode = decode

    def test_a_mask_that_is_not_asked_for_is_seen(self):
        real = bench_worker.operators._forward
        try:
            bench_worker.operators._forward = lambda q, k, v, causal, *rest: real(q, k, v, True, *rest)
            self.assertEqual(self.ask()["status"], "wrong")
            self.assertEqual(self.ask(groups=CHUNKS, type="bfloat16")["status"], "wrong")
        finally:
            bench_worker.operators._forward = real

    def test_a_dropout_of_another_part_is_seen(self):
        real = bench_worker.operators._forward

        def more(*arguments):
            extras = bench_worker.operators.Extras(*arguments[-len(bench_worker.operators.Extras._fields):])
            return real(*arguments[:-len(extras)], *extras._replace(dropout_p=0.4))

        try:
            bench_worker.operators._forward = more
            self.assertEqual(self.ask(dropout=0.2)["status"], "wrong")
        finally:
            bench_worker.operators._forward = real

    def test_refusals_say_why(self):
        result = self.ask(width=63)
        self.assertEqual(result["status"], "refused")
        self.assertIn("63", result["why"])


if __name__ == "__main__":
    unittest.main()
