"""Training and decoding on "cuda" without a GPU: with fake tensors, which have a device and a shape but no values.

A tensor created on the wrong device fails here as on a GPU. This needs a CUDA build of PyTorch. The backward pass needs
a real GPU, but this project's own part of it, the gradients of the fused loss, is computed in the forward pass.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from model import GPTConfig
from modern import make_model
from storygpt.generate import KVCache, sample_token
from storygpt.loss import fuse_loss
from storygpt.settings import Config

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built without CUDA")
CUDA = torch.device("cuda:0")


@pytest.fixture(params=["gpt2", "modern"])
def model(request):
    """A model of each architecture with fake tensors on CUDA."""
    # From now on PyTorch claims to have GPUs. In the first backward pass, autograd starts a thread for each; after that
    # no forked process can train, as those of other tests do. So the first backward pass is here, before.
    torch.ones(1, requires_grad=True).backward()
    with FakeTensorMode(), CUDA:
        config = GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=16, architecture=request.param)
        model = make_model(config)
        for name, buffer in list(model.named_buffers()):  # modern.py makes its tables of rotations on the CPU
            setattr(model, name, buffer.to(CUDA))
        yield model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_training_step_stays_on_the_device(model, dtype, monkeypatch):
    x = torch.empty(4, 16, dtype=torch.long, device=CUDA)
    fuse_loss(model)
    torch.set_autocast_enabled("cuda", dtype is not None)  # torch.autocast refuses to without a GPU
    torch.set_autocast_dtype("cuda", dtype or torch.float16)
    try:
        loss = model(x, x)
        with torch.no_grad():
            losses = F.cross_entropy(model(x).flatten(0, 1), x.flatten(), ignore_index=-1, reduction="none")
            assert model(x).float().device == CUDA  # not fused
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert loss.device == losses.device == CUDA and loss.dtype == losses.dtype == torch.float32
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizers = train.make_optimizers(model, Config(optimizer="muon"))
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).device == CUDA
    for optimizer in optimizers:
        optimizer.step()
        assert {value.device for state in optimizer.state.values() for value in state.values()} == {CUDA}


@torch.no_grad()
def test_cached_decoding_stays_on_the_device(model):
    model.eval()
    x = torch.empty(4, 16, dtype=torch.long, device=CUDA)
    cache = KVCache(16, CUDA)
    assert cache.fixed_shapes
    model(x[:, :5], cache=cache)
    logits = model(x[:, 5:6], cache=cache)
    assert logits.device == CUDA and logits.shape == (4, 1, 300)
    for settings in ((0, 0, 1.0), (0.8, 0, 1.0), (0.8, 5, 0.9)):
        assert sample_token(logits[:, -1], torch.arange(logits.size(-1), device=CUDA), *settings, None).device == CUDA
