"""flashkata.attention as a PyTorch user meets it: any strides, any subset of gradients, clear errors.

    PYTHONPATH=bindings python3 tests/bindings/operators_test.py --library build/solutions/bindings/libflashkata.so
"""

import math
import sys
import unittest

import torch

import flashkata

LIBRARY = sys.argv.pop(sys.argv.index("--library") + 1) if "--library" in sys.argv else None
sys.argv = [a for a in sys.argv if a != "--library"]
steps = flashkata.use(path=LIBRARY)

# Where attention runs: (device, kernels), and how far an output of order 1 may be off.
PLACES = [("cpu", False)]
if steps.has_cuda and torch.cuda.is_available():
    PLACES.append(("cuda", False))
if not steps.has_cuda:
    PLACES.append(("cpu", True))


def normal(*shape, seed=1, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def eager(q, k, v, causal=False, scale=None):
    scores = (q @ k.transpose(2, 3)) * (1.0 / math.sqrt(q.shape[3]) if scale is None else scale)
    if causal:
        queries, keys = scores.shape[2:]
        scores = scores.masked_fill(~torch.ones_like(scores).tril(keys - queries).bool(), -math.inf)
    return scores.softmax(3).nan_to_num(0.0) @ v


class Attention(unittest.TestCase):
    def assert_near(self, got, want, name="", allowed=3e-5):
        self.assertEqual(got.shape, want.shape, name)
        self.assertLessEqual((got - want).abs().max().item(), allowed * max(1.0, want.abs().max().item()), name)

    def compare(self, q, k, v, d_output=None, kernels=False, **options):
        """Output and gradients beside eager attention; d_output None: the gradient of a sum, which has strides of 0."""
        results = []
        for attention in (lambda *a: flashkata.attention(*a, kernels=kernels, **options), lambda *a: eager(*a, **options)):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            output = attention(*leaves)
            output.sum().backward() if d_output is None else output.backward(d_output)
            results.append([output.detach(), *(x.grad for x in leaves)])
        for name, got, want in zip(("output", "dq", "dk", "dv"), *results):
            self.assert_near(got, want, name)

    def test_any_strides(self):
        for device, kernels in PLACES:
            q = normal(2, 9, 3, 32, device=device).transpose(1, 2)  # the model's layout
            k = normal(2, 3, 32, 11, seed=2, device=device).transpose(2, 3)  # channels apart
            v = normal(2, 3, 22, 32, seed=3, device=device)[:, :, ::2]  # every other row
            self.compare(q, k, v, normal(2, 9, 3, 32, seed=4, device=device).transpose(1, 2), kernels)
            self.compare(q, k, v, None, kernels, causal=True)
            shared = normal(1, 1, 11, 32, seed=5, device=device).expand(2, 3, 11, 32)  # one head for all
            self.compare(q, shared, shared, None, kernels)
            odd = normal(2 * 3 * 9 * 32 + 1, seed=6, device=device)[1:].view(2, 3, 9, 32)  # an address of its own
            self.compare(odd, odd, odd, None, kernels, causal=True)

    def test_widths_and_scales(self):
        for device, kernels in PLACES:
            for width, value_width, scale in ((16, 16, 0.3), (40, 24, None), (5, 100, -0.5), (1, 1, None)):
                q, k = normal(1, 2, 6, width, device=device), normal(1, 2, 8, width, seed=2, device=device)
                v = normal(1, 2, 8, value_width, seed=3, device=device)
                d_output = normal(1, 2, 6, value_width, seed=4, device=device)
                self.compare(q, k, v, d_output, kernels, scale=scale)

    def test_queries_without_keys_get_nothing(self):
        for device, kernels in PLACES:
            q, k, v = (normal(1, 1, n, 16, seed=n, device=device) for n in (9, 4, 4))
            self.compare(q, k, v, None, kernels, causal=True)

    def test_only_who_needs_a_gradient_gets_one(self):
        for device, kernels in PLACES:
            for asked in range(8):
                leaves = [normal(1, 1, 4, 16, seed=s, device=device) for s in (1, 2, 3)]
                for i, leaf in enumerate(leaves):
                    leaf.requires_grad_(bool(asked >> i & 1))
                output = flashkata.attention(*leaves, kernels=kernels)
                self.assertEqual(output.requires_grad, asked > 0)
                if asked:
                    output.sum().backward()
                for i, leaf in enumerate(leaves):
                    self.assertEqual(leaf.grad is not None, bool(asked >> i & 1))

    def test_gradients_accumulate_and_one_tensor_may_be_all_three(self):
        x = normal(1, 2, 7, 16).requires_grad_()
        y = x.detach().clone().requires_grad_()
        for _ in range(2):
            flashkata.attention(x, x, x, causal=True).sum().backward()
            eager(y, y, y, causal=True).sum().backward()
        self.assert_near(x.grad, y.grad)

    def test_writing_into_an_input_before_backward_is_caught(self):
        q = normal(1, 1, 4, 16).requires_grad_()
        scaled = q * 1.0
        output = flashkata.attention(scaled, scaled, scaled)
        with torch.no_grad():
            scaled.mul_(2.0)
        with self.assertRaisesRegex(RuntimeError, "modified by an inplace operation"):
            output.sum().backward()

    def test_log_sum_exp(self):
        q, k, v = (normal(1, 2, 5, 16, seed=s) for s in (1, 2, 3))
        for device, kernels in PLACES:
            _, lse = flashkata.attention_forward(*(x.to(device) for x in (q, k, v)), kernels=kernels)
            self.assert_near(lse.cpu(), (q @ k.transpose(2, 3) / 4.0).logsumexp(3))

    def test_half_precision(self):
        for device, kernels in PLACES:
            for dtype, allowed in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
                q, k, v = (normal(2, 3, 33, 64, seed=s, device=device).to(dtype) for s in (1, 2, 3))
                output = flashkata.attention(q, k, v, causal=True, kernels=kernels)
                self.assertEqual(output.dtype, dtype)
                self.assert_near(output.float(), eager(q.float(), k.float(), v.float(), causal=True), str(dtype), allowed)

    def test_deterministic_gradients(self):
        for device, kernels in PLACES[1:]:
            gradients = []
            for _ in range(2):
                q, k, v = (normal(1, 2, 150, 64, seed=s, device=device).half().requires_grad_() for s in (1, 2, 3))
                flashkata.attention(q, k, v, kernels=kernels, deterministic=True).sum().backward()
                gradients.append(torch.stack([q.grad, k.grad, v.grad]))
            self.assertTrue(torch.equal(*gradients))

    def test_bad_arguments_are_named(self):
        q = normal(1, 2, 4, 16)
        for name, arguments, options in (
            ("q: got list", ([1.0], q, q), {}),
            (r"q: got \[4, 16\], allowed is four axes", (q[0, 0], q, q), {}),
            (r"k: got \[1, 2, 4, 8\], allowed is \[1, 2, Sk, 16\]", (q, q[..., :8], q), {}),
            (r"v: got \[1, 2, 3, 16\], allowed is \[1, 2, 4, Dv\]", (q, q, q[:, :, :3]), {}),
            ("q: got torch.float64", (q.double(),) * 3, {}),
            ("v: got torch.float16, allowed is torch.float32, as q", (q, q, q.half()), {}),
            ("scale: got nan", (q, q, q), {"scale": math.nan}),
        ):
            with self.assertRaisesRegex(ValueError, name):
                flashkata.attention(*arguments, **options)

    @unittest.skipUnless(hasattr(torch, "compile"), "torch.compile came with PyTorch 2")
    def test_shapes_are_known_without_numbers(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            q = torch.empty(2, 3, 5, 16)
            self.assertEqual(flashkata.attention(q, q, q).shape, (2, 3, 5, 16))


if __name__ == "__main__":
    unittest.main()
