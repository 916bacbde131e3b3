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


def eager(q, k, v, causal=False, scale=None, window=None, softcap=0.0, enable_gqa=False, kept=None):
    """kept: what dropout multiplies the weights by."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * (1.0 / math.sqrt(q.shape[3]) if scale is None else scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    queries, keys = scores.shape[2:]
    left, right = (-1 if side is None else side for side in window or (None, None))
    allowed = torch.ones_like(scores)
    if causal:
        allowed = allowed.tril(keys - queries)
    if left >= 0:
        allowed = allowed.triu(keys - queries - left)
    if right >= 0:
        allowed = allowed.tril(keys - queries + right)
    weights = scores.masked_fill(allowed == 0, -math.inf).softmax(3).nan_to_num(0.0)
    return (weights if kept is None else weights * kept) @ v


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

    def test_shared_heads(self):
        for device, kernels in PLACES:
            q = normal(2, 6, 9, 32, device=device)
            k, v = (normal(2, 2, 11, 32, seed=s, device=device) for s in (2, 3))
            self.compare(q, k, v, normal(2, 6, 9, 32, seed=4, device=device), kernels, enable_gqa=True, causal=True)
            self.compare(q, k, v, None, kernels, enable_gqa=True, window=(3, 1))
            halves = [x.half() for x in (q, k, v)]
            output = flashkata.attention(*halves, enable_gqa=True, kernels=kernels)
            self.assert_near(output.float(), eager(*(x.float() for x in halves), enable_gqa=True), "half", 4e-3)

    def test_windows_and_softcap(self):
        for device, kernels in PLACES:
            q, k, v = (normal(1, 2, n, 16, seed=n, device=device) for n in (40, 70, 70))
            d_output = normal(1, 2, 40, 16, seed=4, device=device)
            for options in ({"window": (5, 2)}, {"window": (8, -1), "causal": True}, {"softcap": 0.7},
                            {"window": (None, 0), "softcap": 2.0}):
                self.compare(q, k, v, d_output, kernels, **options)

    def test_dropout(self):
        for device, kernels in PLACES:
            q, k = normal(1, 2, 20, 32, device=device), normal(1, 2, 32, 32, seed=2, device=device)
            options = {"dropout_p": 0.4, "kernels": kernels}
            torch.manual_seed(7)
            one_hot = torch.eye(32, device=device).expand(1, 2, 32, 32)
            weights = flashkata.attention(q, k, one_hot, **options)  # the output is what is left of the weights
            kept = (weights != 0).float() / 0.6
            self.assertAlmostEqual((kept > 0).float().mean().item(), 0.6, delta=0.06)
            leaves, other = ([x.detach().requires_grad_() for x in (q, k, normal(1, 2, 32, 32, seed=3, device=device))]
                             for _ in range(2))
            d_output = normal(1, 2, 20, 32, seed=4, device=device)
            torch.manual_seed(7)  # the same weights fall
            flashkata.attention(*leaves, **options).backward(d_output)
            eager(*other, kept=kept).backward(d_output)
            for name, one, two in zip("qkv", leaves, other):
                self.assert_near(one.grad, two.grad, name)
            again = flashkata.attention(q, k, one_hot, **options)  # other weights fall
            self.assertGreater(((again != 0) != (weights != 0)).float().mean().item(), 0.3)

    def test_packed_sequences(self):
        lengths_q, lengths_k = (5, 0, 17, 1), (9, 3, 0, 12)
        for device, kernels in PLACES:
            for heads, kv_heads, dtype, allowed in ((2, 2, torch.float32, 3e-5), (4, 2, torch.float32, 3e-5),
                                                    (4, 2, torch.float16, 5e-3)):
                make = [normal(sum(n), h, 64, seed=s, device=device).to(dtype)
                        for n, h, s in ((lengths_q, heads, 1), (lengths_k, kv_heads, 2), (lengths_k, kv_heads, 3))]
                cu = [torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32, device=device)
                      for n in (lengths_q, lengths_k)]
                d_output = normal(sum(lengths_q), heads, 64, seed=4, device=device)
                for causal in (False, True):
                    leaves = [x.detach().requires_grad_() for x in make]
                    output = flashkata.varlen_attention(*leaves, *cu, 17, 12, causal=causal, kernels=kernels)
                    output.backward(d_output.to(dtype))
                    other = [x.detach().float().requires_grad_() for x in make]
                    parts = [x.split(n) for x, n in zip(other, (lengths_q, lengths_k, lengths_k))]
                    want = torch.cat([eager(*(x.transpose(0, 1).unsqueeze(0) for x in one), causal, enable_gqa=True)[0]
                                      .transpose(0, 1) for one in zip(*parts)])
                    want.backward(d_output)
                    self.assert_near(output.float(), want, "output", allowed)
                    for name, x, y in zip("qkv", leaves, other):
                        self.assert_near(x.grad.float(), y.grad, name, 2 * allowed)

    def test_groups_share_keys(self):
        groups = [(0, 10, 0, 30), (10, 25, 0, 60), (25, 25, 5, 9), (26, 40, 20, 21)]  # query 25 is in none
        for device, kernels in PLACES:
            dtype, allowed = (torch.float16, 5e-3) if kernels or device == "cuda" else (torch.float32, 3e-5)
            make = [normal(n, h, 64, seed=s, device=device).to(dtype) for n, h, s in ((40, 4, 1), (60, 2, 2), (60, 2, 3))]
            leaves = [x.detach().requires_grad_() for x in make]
            other = [x.detach().float().requires_grad_() for x in make]
            d_output = normal(40, 4, 64, seed=4, device=device)
            output = flashkata.grouped_attention(*leaves, groups, causal=True, kernels=kernels)
            output.backward(d_output.to(dtype))
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in other)
            want = torch.zeros_like(other[0])
            for q_begin, q_end, k_begin, k_end in groups:
                part = eager(q[:, :, q_begin:q_end], k[:, :, k_begin:k_end], v[:, :, k_begin:k_end], True, enable_gqa=True)
                want = torch.cat([want[:q_begin], part[0].transpose(0, 1), want[q_end:]])
            want.backward(d_output)
            self.assert_near(output.float(), want, "output", allowed)
            for name, x, y in zip("qkv", leaves, other):
                self.assert_near(x.grad.float(), y.grad, name, 2 * allowed)

    def test_decoding_from_a_cache_in_pages_and_in_one_piece(self):
        lengths = [21, 4, 37]
        for device, kernels in PLACES:
            q = normal(3, 4, 2, 64, device=device)
            k, v = (normal(3, 2, 40, 64, seed=s, device=device) for s in (2, 3))
            want = torch.cat([eager(q[b:b + 1], k[b:b + 1, :, :n], v[b:b + 1, :, :n], True, enable_gqa=True)
                              for b, n in enumerate(lengths)])
            for b, n in enumerate(lengths):
                k[b, :, n:] = v[b, :, n:] = math.nan
            in_use = torch.tensor(lengths, dtype=torch.int32, device=device)
            for splits in (None, 1, 5):
                got = flashkata.decode(q, k, v, in_use, splits=splits, kernels=kernels)
                self.assert_near(got, want, f"{splits} splits")
            order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
            table = order.to(torch.int32).view(3, 4).to(device)
            pages = [torch.empty(12, 2, 10, 64, device=device) for _ in range(2)]
            for page, x in zip(pages, (k, v)):
                page[table.long()] = x.view(3, 2, 4, 10, 64).transpose(1, 2)
            self.assert_near(flashkata.decode(q, *pages, in_use, block_table=table, kernels=kernels), want, "pages")

    def test_a_cache_that_grows(self):
        for device, kernels in PLACES:
            q, k, v = (normal(2, h, 30, 64, seed=s, device=device) for s, h in ((1, 4), (2, 2), (3, 2)))
            cache = flashkata.PagedCache(layers=1, kv_heads=2, width=64, pages=8, page_size=8, device=device, kernels=kernels)
            cache.begin(batch=2)
            outputs = []
            for first, last in ((0, 19), (19, 20), (20, 30)):
                cache.extend(last - first)
                outputs.append(cache.attend(0, *(x[:, :, first:last] for x in (q, k, v))))
            self.assert_near(torch.cat(outputs, 2), eager(q, k, v, True, enable_gqa=True))
            self.assertEqual(cache.free_pages, 0)
            with self.assertRaisesRegex(flashkata.FlashKataError, "1 page is missing"):
                cache.extend(3)
            cache.end()
            self.assertEqual(cache.free_pages, 8)

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
            (r"k: got \[1, 1, 4, 16\], allowed is 2 heads, as q, or a divisor", (q, q[:, :1], q[:, :1]), {}),
            (r"k: got \[1, 3, 4, 16\], allowed is a number of heads that divides 2", (q, *[normal(1, 3, 4, 16)] * 2),
             {"enable_gqa": True}),
            ("dropout_p: got 1.0, allowed is at least 0 and less than 1", (q, q, q), {"dropout_p": 1.0}),
            (r"window: got \(3,\)", (q, q, q), {"window": (3,)}),
            ("options: got dropout_p and window or softcap, allowed is one of them", (q, q, q),
             {"dropout_p": 0.1, "softcap": 1.0}),
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
