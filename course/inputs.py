"""Random inputs that checks share: float64, from numpy's generator, small enough to print."""
import torch


def normal(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape))


def integers(rng, most, *shape):
    return torch.from_numpy(rng.integers(0, most, shape))


def model_of(prism, rng, **sizes):
    """A small PRISM in float64 with parameters from rng, large enough for every path to matter"""
    shape = dict(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=6, n_proto=7, top_k=3,
                 bias=True)
    config = prism.PRISMConfig(**(shape | sizes))
    model = prism.PRISM(config).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_scale = "ln_" in name and name.endswith("weight")
            noise = 0.4 * normal(rng, *p.shape)
            p.copy_(noise + is_scale)
    return model
