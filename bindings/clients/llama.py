"""A Llama-architecture model whose attention is this course's.

    python3 bindings/clients/llama.py --preset solutions-cuda --device cuda --type bfloat16 --curve loss.svg

Builds a small model from a configuration (random weights, nothing is loaded), runs it with Transformers' own attention
and with flashkata.attention, and prints how far logits and all parameter gradients are apart; then trains both for some
steps from the same weights on the same data; then has the trained model go on with a few beginnings, token by token, with
Transformers' cache and with flashkata.PagedCache. Needs PyTorch 2 and Transformers 5.
"""

import argparse
import copy
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM

import flashkata

SYMBOLS = 64


def for_transformers(attention):
    """What Transformers calls in every layer: query [B, H, S, D], key and value [B, Hk, S, D], Hk a divisor of H."""

    def call(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
        if attention_mask is not None:
            raise ValueError("attention_mask: got a mask, allowed is None: this client knows only the causal one")
        if dropout:
            raise ValueError(f"dropout: got {dropout}, allowed is 0")
        return attention(module, query, key, value, scaling).transpose(1, 2), None

    return call


# Transformers takes every name with "flash" in it for a package of its own.
AttentionInterface.register("kata", for_transformers(
    lambda _, q, k, v, s: flashkata.attention(q, k, v, causal=True, scale=s, enable_gqa=True)))


def pytorch(_, q, k, v, scaling):
    """As "sdpa", but for backends that want as many key/value heads as query heads."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)


AttentionInterface.register("pytorch", for_transformers(pytorch))
paged_cache = None  # of the generation that is under way
AttentionInterface.register("paged", for_transformers(
    lambda module, q, k, v, s: paged_cache.attend(module.layer_idx, q, k, v, scale=s)))


def build(options):
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=SYMBOLS, hidden_size=options.heads * options.width, intermediate_size=3 * options.heads * options.width,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.kv_heads,
        head_dim=options.width, max_position_embeddings=2 * options.tokens, attention_dropout=0.0,
    )
    return LlamaForCausalLM(config).to(device=options.device)


def batch(options, step):
    """Text of a made-up language: which four tokens may follow a token is fixed by a table, which of them, by chance."""
    table = torch.randint(0, SYMBOLS, (SYMBOLS, 4), generator=torch.Generator().manual_seed(options.seed))
    generator = torch.Generator().manual_seed(1000 * options.seed + step)
    choices = torch.randint(0, 4, (options.tokens, options.batch), generator=generator)
    tokens = [torch.randint(0, SYMBOLS, (options.batch,), generator=generator)]
    for choice in choices[1:]:
        tokens.append(table[tokens[-1], choice])
    return torch.stack(tokens, dim=1).to(options.device)


def forward(model, tokens, options):
    """Weights stay in float32; with another --type, products and attention are computed in it."""
    dtype = getattr(torch, options.type)
    with torch.autocast(options.device, dtype=dtype, enabled=dtype != torch.float32):
        return model(input_ids=tokens, labels=tokens)


def run(model, tokens, implementation, options):
    """Logits, and every parameter's gradient."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    result = forward(model, tokens, options)
    result.loss.backward()
    return result.logits.detach().float(), {n: p.grad.float().clone() for n, p in model.named_parameters()}


def differences(one, other):
    """The largest difference of the logits, and the largest of a gradient relative to that gradient's largest number."""
    logits = (one[0] - other[0]).abs().max().item()
    gradients = {n: ((one[1][n] - g).abs().max() / g.abs().max().clamp(min=1e-30)).item() for n, g in other[1].items()}
    worst = max(gradients, key=gradients.get)
    return logits, gradients[worst], worst


def train(model, options, implementation):
    model.set_attn_implementation(implementation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    losses = []
    for step in range(options.steps):
        optimizer.zero_grad()
        tokens = batch(options, step)
        loss = forward(model, tokens, options).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def generate(model, prompt, options, paged):
    """The likeliest token each time, options.generate of them: [batch, prompt and new tokens]."""
    global paged_cache
    model.set_attn_implementation("paged" if paged else "sdpa")
    dtype = getattr(torch, options.type)
    longest = prompt.shape[1] + options.generate
    if paged:
        pages = len(prompt) * -(-longest // 16)  # not one too many
        paged_cache = flashkata.PagedCache(options.layers, options.kv_heads, options.width, pages,
                                           device=options.device, dtype=dtype)
        paged_cache.begin(len(prompt))
    else:
        past = DynamicCache(config=model.config)
    tokens, new = prompt, prompt
    for _ in range(options.generate):
        positions = torch.arange(tokens.shape[1] - new.shape[1], tokens.shape[1], device=tokens.device)[None]
        if paged:
            paged_cache.extend(new.shape[1])
        with torch.autocast(options.device, dtype=dtype, enabled=dtype != torch.float32):
            cache = {"use_cache": False} if paged else {"use_cache": True, "past_key_values": past}
            logits = model(input_ids=new, position_ids=positions, **cache).logits
        new = logits[:, -1:].float().argmax(-1)
        tokens = torch.cat([tokens, new], dim=1)
    if paged:
        paged_cache.end()
    return tokens


def draw(curves, path, title):
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (name, losses), style in zip(curves.items(), ("-", "--")):
        axes.plot(range(1, len(losses) + 1), losses, style, label=name, linewidth=2)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", help="whose steps; by default your own")
    parser.add_argument("--library", metavar="PATH", help="a libflashkata.so instead of a preset")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--type", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--generate", type=int, default=64, help="tokens that the trained model goes on for")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--curve", metavar="FILE.svg", help="draw both losses")
    options = parser.parse_args()
    try:
        flashkata.use(options.preset, options.library)
    except flashkata.FlashKataError as error:
        parser.exit(2, f"{error}\n")

    model = build(options)
    start = copy.deepcopy(model.state_dict())
    tokens = batch(options, 0)
    stock = run(model, tokens, "sdpa", options)
    print(f"{options.layers} layers, {options.heads} heads of {options.width} over {options.kv_heads} key/value heads, "
          f"{options.batch} x {options.tokens} tokens, {options.type} on {options.device}")
    print(f"{'':44}{'logits':>12}{'gradients':>12}  worst in")
    print_row("flashkata against stock", differences(run(model, tokens, "kata", options), stock))
    if options.device == "cuda":
        backends = {"math": SDPBackend.MATH, "mem-efficient": SDPBackend.EFFICIENT_ATTENTION}
        if options.type != "float32":
            backends["flash"] = SDPBackend.FLASH_ATTENTION
        results = {}
        for name, backend in backends.items():
            with sdpa_kernel(backend):
                results[name] = run(model, tokens, "pytorch", options)
        for name in list(results)[1:]:
            print_row(f"PyTorch's {name} against its math", differences(results[name], results["math"]))
        print_row("flashkata against PyTorch's math", differences(run(model, tokens, "kata", options), results["math"]))

    curves = {}
    for name, implementation in (("stock attention", "sdpa"), ("flashkata", "kata")):
        model.load_state_dict(start)
        curves[name] = train(model, options, implementation)
    print(f"\n{'step':>6}" + "".join(f"{name:>18}" for name in curves))
    for step in sorted({*range(0, options.steps, max(1, options.steps // 10)), options.steps - 1}):
        print(f"{step + 1:6}" + "".join(f"{losses[step]:18.4f}" for losses in curves.values()))
    apart = max(abs(a - b) for a, b in zip(*curves.values()))
    print(f"largest difference of the losses: {apart:.2e}")
    same = True
    if options.generate > 0:
        prompt = batch(options, options.steps)[:, :21]
        stock, ours = (generate(model, prompt, options, paged) for paged in (False, True))
        same = bool((stock == ours).all())
        print(f"generated {len(prompt)} x {options.generate} tokens with the paged cache: "
              + ("the same as stock" if same else f"{int((stock != ours).sum())} differ from stock"))
    if options.curve:
        draw(curves, options.curve, f"A Llama-architecture model trained twice, {options.type}")
    return 0 if math.isfinite(apart) and (same or options.type != "float32") else 1  # 16 bits may part where two tokens tie


def print_row(name, result):
    print(f"{name:44}{result[0]:12.2e}{result[1]:12.2e}  {result[2]}")


if __name__ == "__main__":
    sys.exit(main())
