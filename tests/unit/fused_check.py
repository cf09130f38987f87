"""The kernels of model/fused.py on a CPU, by Triton's interpreter, against the plain formulas in float64.

And whole models of the layers that use them against models of the plain layers.

Run by test_fused.py with TRITON_INTERPRET=1. Prints {"function, type": {what: error / bound}}; below 1 is good.
"""

import dataclasses
import json

import numpy as np
import torch
import torch.nn.functional as F
import triton.language as tl
from liger_kernel.ops import fused_add_rms_norm, rms_norm
from triton.runtime import interpreter

from molmo2_nemo import compat, parallel
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.components import is_adapter
from molmo2_nemo.config.schema import LoraConfig, ParallelConfig
from molmo2_nemo.model import fused, fused_vit, loss
from molmo2_nemo.model.attention import attend
from molmo2_nemo.model.lora import add_adapters
from molmo2_nemo.model.molmo2 import Molmo2
from molmo2_nemo.random_batches import packed_row
from molmo2_nemo.training.batches import own_part
from molmo2_nemo.training.step import MODEL_INPUTS, TARGETS

EPS = 1e-6
REPLACED = (compat.INTERPRETER_SCALAR, compat.INTERPRETER_CONVERT)
# Of the largest value. A kernel rounds what it stores; its inputs are the same in float64.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


def complete_the_interpreter():
    """What compiled kernels have and the interpreter (Triton 3.8) has not.

    Scalars of float32; libdevice; bf16 that is rounded to the nearest number, and products of bf16.
    """
    convert, convert_float = (getattr(interpreter, name) for name in REPLACED)
    multiply = interpreter.InterpreterBuilder.create_fmul

    def with_floats(value):
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return convert(value)

    def rounded(data, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
        return convert_float(data, source, target, rounding_mode)

    def product(self, a, b):
        if a.dtype.scalar != tl.bfloat16:
            return multiply(self, a, b)
        a, b = (torch.from_numpy(np.ascontiguousarray(x.data)).view(torch.bfloat16) for x in (a, b))
        return interpreter.TensorHandle((a * b).view(torch.uint16).numpy(), tl.bfloat16)

    for name, function in zip(REPLACED, (with_floats, rounded)):
        setattr(interpreter, name, function)
    interpreter.InterpreterBuilder.create_fmul = product
    for module in (rms_norm, fused_add_rms_norm):
        module.rsqrt = lambda x: tl.rsqrt(x)  # looked up when it is called: the interpreter replaces it by its own


def plain_rms(x, weight):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def plain_rotate(x, cos, sin):
    """x [s, B, N, D]; cos, sin [s * B, D / 2]. Megatron's formula, without interleaving."""
    cos, sin = (torch.cat((y, y), -1).view(*x.shape[:2], 1, -1) for y in (cos, sin))
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), -1) * sin


def plain_split(qkv, q_weight, k_weight, cos, sin):
    s, B, _ = qkv.shape
    q, k, v = qkv.view(s, B, GROUPS, -1, D).split((PER_GROUP, 1, 1), dim=3)
    q, k, v = (x.reshape(s, B, -1, D) for x in (q, k, v))
    return plain_rotate(plain_rms(q, q_weight), cos, sin), plain_rotate(plain_rms(k, k_weight), cos, sin), v


def plain_add_norm(x, delta, bias, weight, norm_bias):
    total = x + delta + bias
    if total.dtype == torch.float64:  # the norm is that of the sum as it is stored
        total = total + (total.to(DTYPE[0]).double() - total).detach()
    return total, F.layer_norm(total, x.shape[-1:], weight, norm_bias, EPS)


def attend_in_crop(q, k, v, mask):
    """[C, P, N, D] each -> [C, P, N * D], as layers.CropAttention."""
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), None, VIT_D**-0.5).transpose(1, 2).flatten(2)


def plain_attention(normed, weight, bias, out):
    qkv = F.linear(normed, weight, bias).view(*normed.shape[:-1], -1, 3, VIT_D)
    return F.linear(attend_in_crop(*qkv.unbind(-2), None), out)


def plain_mlp(normed, weight, bias, out):
    return F.linear(F.gelu(F.linear(normed, weight, bias), approximate="tanh"), out)


def half(function, again):
    """A half of a ViT's layer after its norm; made again from the norm's input, mean and scale if `again`."""

    def run(x, norm_weight, norm_bias, *weights):
        x, normed, *moments = fused_vit.add_norm(x, None, None, norm_weight, norm_bias, EPS)
        kept = (x, *moments, norm_weight, norm_bias) if again else None
        return x, function(normed, *weights, kept)

    return run


def plain_half(function):
    return lambda x, w, b, *weights: (x, function(F.layer_norm(x, x.shape[-1:], w, b, EPS), *weights))


DTYPE = [torch.float32]  # that is checked now
GROUPS, PER_GROUP, D, S, B, H = 2, 3, 12, 5, 2, 40
VIT_D, INNER = 10, 70
ATTENTION = [(3, 7, H), (H,), (H,), (3 * H, H), (3 * H,), (H, H)]
MLP = [(3, 7, H), (H,), (H,), (INNER, H), (INNER,), (H, INNER)]


def attention_half(normed, weight, bias, out, kept):
    return fused_vit.attention(normed, weight, bias, out, attend_in_crop, VIT_D, kept)


ROWS = (S, B)
# (kernel, plain formula, shapes of the inputs that have gradients, inputs without)
CASES = {
    "rms_norm": (lambda x, w: fused.rms_norm(x, w, EPS), plain_rms, [(*ROWS, H), (H,)]),
    "rms_norm_and_residual": (
        lambda x, w: fused.rms_norm_and_residual(x, w, EPS),
        lambda x, w: (plain_rms(x, w), x),
        [(*ROWS, H), (H,)],
    ),
    "layer_norm": (
        lambda x, w, b: fused_vit.add_norm(x, None, None, w, b, EPS)[:2],
        lambda x, w, b: (x, F.layer_norm(x, x.shape[-1:], w, b, EPS)),
        [(*ROWS, H), (H,), (H,)],
    ),
    "add_norm": (
        lambda x, y, c, w, b: fused_vit.add_norm(x, y, c, w, b, EPS)[:2],
        plain_add_norm,
        [(*ROWS, H), (*ROWS, H), (H,), (H,), (H,)],
    ),
    "attention of the ViT": (half(attention_half, False), plain_half(plain_attention), ATTENTION),
    "attention of the ViT, made again": (half(attention_half, True), plain_half(plain_attention), ATTENTION),
    "MLP of the ViT": (half(fused_vit.mlp, False), plain_half(plain_mlp), MLP),
    "MLP of the ViT, made again": (half(fused_vit.mlp, True), plain_half(plain_mlp), MLP),
    "swiglu": (fused.swiglu, lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], [(*ROWS, 2 * H)]),
    "bias_gelu": (fused.bias_gelu, lambda x, b: F.gelu(x + b, approximate="tanh"), [(7, 3, 600), (600,)]),
    "bias_add": (fused.bias_add, lambda x, b, r: x + b + r, [(*ROWS, H), (H,), (*ROWS, H)]),
    "split_norm_rotate": (
        lambda *inputs: fused.split_norm_rotate(*inputs, GROUPS, EPS),
        plain_split,
        [(*ROWS, GROUPS * (PER_GROUP + 2) * D), (D,), (D,)],
    ),
    "rotate": (fused.rotate, plain_rotate, [(*ROWS, PER_GROUP, D)]),
}


def inputs_of(name, shapes, dtype):
    torch.manual_seed(0)
    scales = [shape[-1] ** -0.5 if "ViT" in name and len(shape) == 2 else 1.0 for shape in shapes]
    inputs = [(torch.randn(shape) * scale).to(dtype).requires_grad_() for shape, scale in zip(shapes, scales)]
    if "rotate" in name:
        angles = torch.randint(0, 20_000, (S * B, 1)) * 10_000.0 ** (-torch.arange(D // 2) / (D // 2))
        inputs += [angles.cos().float(), angles.sin().float()]
    return inputs


def outputs_and_gradients(function, inputs, grads):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [x for x in inputs if x.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, leaves, [g.to(y.dtype) for g, y in zip(grads, outputs)])]


def check(name, dtype):
    DTYPE[0] = dtype
    kernel, plain, shapes = CASES[name]
    inputs = inputs_of(name, shapes, dtype)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    with torch.no_grad():
        made = plain(*exact)
    grads = [torch.randn(y.shape).to(dtype) for y in (made if isinstance(made, tuple) else (made,))]
    found, expected = outputs_and_gradients(kernel, inputs, grads), outputs_and_gradients(plain, exact, grads)
    with compat.fake_tensor_mode() as mode:
        fake = [mode.from_tensor(x) for x in inputs]
        shapes = outputs_and_gradients(kernel, fake, [mode.from_tensor(g) for g in grads])
    report, roundings = {}, 4 if "ViT" in name else 1  # products' results are rounded, too
    for i, (a, b, c) in enumerate(zip(found, expected, shapes, strict=True)):
        assert (a.shape, a.dtype, a.stride()) == (c.shape, c.dtype, c.stride()), (name, i, a.stride(), c.stride())
        assert a.dtype == dtype and a.shape == b.shape, (name, i)
        report[i] = float(((a.double() - b).abs().max() / b.abs().max()).detach()) / BOUNDS[dtype] / roundings
    return report


def check_head(dtype):
    """The kernels of the head's losses: exact logits, gradients in place, a rank's rows that are padding or not."""
    torch.manual_seed(0)
    report, count, width = {}, 9, 5000
    for own in (width, 4100):
        logits = (3 * torch.randn(count, width)).to(dtype)
        index = torch.randint(own, (count,)).where(torch.rand(count) < 0.7, -1)
        scale, grad_loss = torch.rand(2, count)
        exact = logits[:, :own].double()
        largest, total, chosen = loss.statistics(logits, index, own, fused=True)
        log_partition = exact.logsumexp(1)
        made = {"log-partition": (largest + total.log(), log_partition)}
        made["of the label"] = (chosen, exact.gather(1, index.clamp(min=0)[:, None])[:, 0] * (index >= 0))
        loss.gradient_(logits, index, log_partition.float(), scale, grad_loss, own, fused=True)
        expected = (exact - log_partition[:, None]).exp() * scale[:, None].double()
        expected -= F.one_hot(index.clamp(min=0), own) * (index >= 0)[:, None] * grad_loss[:, None].double()
        made["gradient"] = (logits, F.pad(expected, (0, width - own)))
        for what, (a, b) in made.items():
            report[f"{what}, {own}"] = float((a.double() - b).abs().max() / b.abs().max()) / BOUNDS[dtype]
    with compat.fake_tensor_mode() as mode:
        fake = loss.statistics(*map(mode.from_tensor, (logits, index)), own, fused=True)
        assert [(x.shape, x.dtype) for x in fake] == [((count,), torch.float32)] * 3
    return report


def check_dropout(dtype):
    """What is kept is scaled, rows outside of `where` are left alone, the backward pass drops the same."""
    torch.manual_seed(0)
    x, residual = (torch.randn(S, B, 1100).to(dtype).requires_grad_() for _ in range(2))
    where = torch.rand(S, B, 1) < 0.6
    report = {}
    for positions in (None, where):
        made = fused.dropout_add(x, residual, positions, 0.25)
        grad = torch.randn(S, B, 1100).to(dtype)
        grad_x, grad_residual = torch.autograd.grad(made, (x, residual), grad)
        dropped = grad_x == 0
        assert torch.equal(grad_residual, grad)
        at = torch.ones_like(where) if positions is None else where
        assert not dropped[~at.expand_as(dropped)].any()
        share = dropped[at.expand_as(dropped)].float().mean().item()
        factors = torch.where(at, torch.where(dropped, 0.0, 1 / 0.75), 1.0).double()
        for what, a, b in (
            ("forward", made, residual.double() + x.double() * factors),
            ("backward", grad_x, grad.double() * factors),
        ):
            report[f"{what}, {'all' if positions is None else 'some'}"] = (
                float((a.double() - b).abs().max() / b.abs().max()) / BOUNDS[dtype]
            )
        report[f"share dropped {share:.3f}"] = abs(share - 0.25) / 0.03  # 11,000 draws: 7 standard deviations
        assert not torch.equal(
            dropped, torch.autograd.grad(fused.dropout_add(x, residual, positions, 0.25).sum(), x)[0] == 0
        )
    with compat.fake_tensor_mode() as mode:
        fake = fused.dropout_add(mode.from_tensor(x), mode.from_tensor(residual), mode.from_tensor(where), 0.25)
        assert (fake.shape, fake.dtype) == (made.shape, made.dtype)
    return report


def check_model(lora=None, **changes):
    """Losses and gradients of a whole model with the kernels and without, float32, relative to the largest.

    lora: adapters that are added, with random weights.
    """
    model = dataclasses.replace(compose("stage1", ["model=tiny", "data=sample"]).model, num_layers=1, **changes)
    batch = own_part(packed_row(model, 48, 2, seed=1), model)
    found = []
    for kernels, recompute in ((False, False), (True, False), (True, "layers"), (False, "layers")):
        configs = parallel.transformer_configs(model, ParallelConfig(), "cpu", "fp32", {})
        for config in configs.values():
            config.fused_kernels = kernels
        parallel.seed_everything(3)
        built = Molmo2(model, configs, parallel.solo_groups(), vision_recompute=recompute).train()
        if lora is not None:
            modules = dict(built.named_modules())
            add_adapters(modules, model, lora, configs["decoder"], built.tp_group, seed=0)
            for name, parameter in built.named_parameters():
                if is_adapter(name):
                    torch.nn.init.normal_(parameter, std=0.05)
        losses = built(**{name: batch[name] for name in (*MODEL_INPUTS, *TARGETS)})
        losses.sum().backward()
        found.append({"losses": losses.detach()} | {n: p.grad for n, p in built.named_parameters()})
    plain, *others = found
    # The pooling keys' bias has a gradient of zero but for rounding, so differences are relative to 0.03 at least.
    assert all(plain.keys() == other.keys() for other in others)
    assert len(batch["patch_index"][0]) and len(batch["loss_index"])
    return {
        n: max(float((other[n] - plain[n]).abs().max() / plain[n].abs().max().clamp(min=0.03)) for other in others)
        / 1e-4
        for n in plain
    }


if __name__ == "__main__":
    complete_the_interpreter()
    found = {}
    for dtype in BOUNDS:
        for name in CASES:
            found[f"{name}, {dtype}"] = check(name, dtype)
        found[f"dropout_add, {dtype}"] = check_dropout(dtype)
        found[f"head, {dtype}"] = check_head(dtype)
    parallel.initialize(ParallelConfig(), "cpu", timeout_minutes=2, seed=0)
    found["Qwen3 layers"] = check_model()
    found["OLMo 3 layers"] = check_model(qk_norm="full_width", norm_after=True)
    everywhere = LoraConfig(rank=4, targets=["attention", "mlp", "connector", "vit"])
    found["layers with adapters"] = check_model(everywhere)
    print(json.dumps(found))
