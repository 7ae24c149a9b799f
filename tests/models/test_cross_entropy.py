"""The loss without logits is the loss with them: value, gradients, memory."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_fwp import VOCAB, assert_close, tiny_model, tokens
from transformers import Trainer, TrainingArguments

from hf_fwp import cross_entropy

SINGLE = 1e-6  # transformers takes the loss from logits in float32, whatever the model's type


def labels():
    found = tokens(3, 11).clone()
    found[0, :6], found[2] = -100, -100
    return found


def losses(model, **given):
    """(loss, gradients) of one and the same model with the chunked loss and without it."""
    found = []
    for chunked in (True, False):
        model.config.chunked_loss = chunked
        out = model.train()(tokens(3, 11), use_cache=False, **given)
        assert (out.logits is None) == chunked
        found.append([out.loss, *torch.autograd.grad(out.loss, [x for x in model.parameters() if x.requires_grad])])
    return found


@pytest.fixture
def few(monkeypatch):
    """Four tokens at a time, and a rest."""
    monkeypatch.setattr(cross_entropy, "LOGITS", 4 * VOCAB + 3)
    monkeypatch.setattr(cross_entropy, "ADDED", 16)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", [None, 7, torch.tensor(9)], ids=str)
def test_equals_the_loss_from_logits(count, tied):
    model = tiny_model(tie_word_embeddings=tied)
    for a, b in zip(*losses(model, labels=labels(), num_items_in_batch=count), strict=True):
        assert_close(a, b, SINGLE)


@pytest.mark.usefixtures("few")
def test_labels_that_are_shifted_already():
    for a, b in zip(*losses(tiny_model(), labels=labels(), shift_labels=labels().flip(1)), strict=True):
        assert_close(a, b, SINGLE)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_it_is_no_further_from_float64_than_the_loss_from_logits(autocast):
    torch.manual_seed(0)
    h, head = torch.randn(1, 400, 16), torch.nn.Linear(16, VOCAB, bias=False)
    y = torch.randint(VOCAB, (1, 400))
    kind = torch.float32 if autocast else torch.bfloat16

    def of(dtype, loss):
        x, layer = h.to(torch.bfloat16).to(dtype).requires_grad_(), torch.nn.Linear(16, VOCAB, bias=False)
        layer.weight = torch.nn.Parameter(head.weight.detach().to(torch.bfloat16).to(dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != torch.float64):
            total = loss(x, layer)
        return [total, *torch.autograd.grad(total, [x, layer.weight])]

    def plain(x, layer):
        logits = layer(x)[0, :-1].to(torch.promote_types(x.dtype, torch.float32))
        return torch.nn.functional.cross_entropy(logits, y[0, 1:])

    def chunked(x, layer):
        return cross_entropy.causal_loss(x, layer, y)

    truth = of(torch.float64, plain)
    for a, b, exact in zip(of(kind, chunked), of(kind, plain), truth, strict=True):
        assert a.dtype == b.dtype
        assert (a - exact).norm() <= 1.2 * (b - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_logits_that_a_family_scales_and_caps(scale, cap):
    h = torch.randn(33, 8, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(8, VOCAB, bias=False, dtype=torch.float64)
    y, readout = labels().flatten(), cross_entropy.Readout(scale, cap)
    z = scale * head(h) if cap is None else cap * torch.tanh(scale * head(h) / cap)
    both = [
        cross_entropy.summed_loss(h, head, y, readout=readout),
        torch.nn.functional.cross_entropy(z, y, reduction="sum"),
    ]
    for a, b in zip(*([loss, *torch.autograd.grad(loss, [h, head.weight])] for loss in both), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_no_token_is_no_loss():
    h, head = torch.randn(0, 8, requires_grad=True), torch.nn.Linear(8, VOCAB, bias=False)
    loss = cross_entropy.summed_loss(h, head, torch.empty(0, dtype=torch.long))
    grads = torch.autograd.grad(loss, [h, head.weight])
    assert loss == 0
    assert (grads[0].shape, float(grads[1].abs().sum())) == (h.shape, 0)


def test_a_frozen_head_gets_no_gradient(monkeypatch):
    model = tiny_model()
    model.lm_head.requires_grad_(False)
    asked = []
    add = cross_entropy.add_gradients
    monkeypatch.setattr(cross_entropy, "add_gradients", lambda grads, *rest: asked.append(grads) or add(grads, *rest))
    for a, b in zip(*losses(model, labels=labels()), strict=True):
        assert_close(a, b, SINGLE)
    assert all(weight is None and hidden is not None for hidden, weight, _ in asked)


def test_never_holds_all_logits(few):
    """The largest tensor that any operation makes has the logits of a few tokens."""
    largest = 0

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
            nonlocal largest
            out = operator(*arguments, **(keywords or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (VOCAB,):
                largest = max(largest, out.numel())
            return out

    model = tiny_model(chunked_loss=True).train()
    with Watched():
        model(tokens(3, 11), labels=labels(), use_cache=False).loss.backward()
    assert largest <= 4 * VOCAB
    model.config.chunked_loss = False
    with Watched():
        model(tokens(3, 11), labels=labels(), use_cache=False).loss.backward()
    assert largest == 3 * 11 * VOCAB


def test_evaluation_returns_logits():
    model = tiny_model(chunked_loss=True)
    assert model(tokens(), labels=tokens()).logits.shape[-1] == VOCAB
    assert model.train()(tokens()).logits.shape[-1] == VOCAB


def test_an_adapter_on_the_head_is_not_passed_over():
    model = get_peft_model(tiny_model(chunked_loss=True), LoraConfig(r=2, target_modules=["lm_head"]))
    assert model.train()(input_ids=tokens(), labels=tokens()).logits is not None


def test_compiled_without_a_graph_break():
    h, head = torch.randn(3, 11, 8, requires_grad=True), torch.nn.Linear(8, VOCAB, bias=False)
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy.causal_loss, fullgraph=True, backend="aot_eager")
    both = [loss(h, head, labels()) for loss in (compiled, cross_entropy.causal_loss)]
    grads = [torch.autograd.grad(loss, [h, head.weight]) for loss in both]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_trainer_uses_it(tmp_path):
    rows = [{"input_ids": a, "labels": a} for a in tokens(8, 10)]
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True}
    settings |= {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    found = []
    for chunked in (True, False):
        model = tiny_model(chunked_loss=chunked)
        run = Trainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=rows, eval_dataset=rows)
        run.train()
        found.append([*model.parameters(), torch.tensor(run.evaluate()["eval_loss"])])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, SINGLE)


@pytest.mark.parametrize(
    "wrong",
    [
        ("losses", lambda *a: (lambda loss, error: (loss, error.abs()))(*losses_of(*a))),
        ("losses", lambda x, y, i: losses_of(x, y.roll(1), i)),
        ("losses", lambda x, y, i: losses_of(x, y.clamp_min(0), i)),
        ("add_gradients", lambda grads, tokens, *a: add_of(grads, slice(0, tokens.stop - tokens.start), *a)),
    ],
    ids=["sign", "shifted", "ignored labels counted", "always the first tokens"],
)
@pytest.mark.usefixtures("few")
def test_a_wrong_loss_is_rejected(wrong, monkeypatch):
    monkeypatch.setattr(cross_entropy, *wrong)
    with pytest.raises(AssertionError, match="relative error"):
        test_equals_the_loss_from_logits(None, False)


losses_of, add_of = cross_entropy.losses, cross_entropy.add_gradients
