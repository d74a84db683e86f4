"""Small models for the numeric tests, real ones with random weights and scripted ones; a recorder of activations."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pytest_qsa.engine.modules import run_batch

torch.set_num_threads(1)  # two xdist workers on two cores; and sums don't depend on the machine

VOCABULARY = 64
WIDTH = 32
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
BLOCKS, LINEAR = r"layers\.\d+$", r"_proj$"
BOS = 1
SINK_CHANNEL = 5


def _build(kind, config, dtype=torch.float32, seed=0):
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{config}Config")(**kind[1])
    return getattr(transformers, kind[0])(config).to(dtype).eval()


def llama(dtype=torch.float32, *, sink=False, seed=0, **overrides):
    """Return a Llama; with `sink`, the token BOS has a value some 600 × the others' that the stream carries on."""
    model = _build(
        ("LlamaForCausalLM", {**_COMMON, "num_key_value_heads": 2, "initializer_range": 0.2, **overrides}),
        "Llama", dtype, seed,
    )  # fmt: skip
    if sink:
        with torch.no_grad():
            model.model.embed_tokens.weight[BOS, SINK_CHANNEL] = 2000.0
    return model


def mixtral(seed=0):
    return _build(
        ("MixtralForCausalLM", {**_COMMON, "num_key_value_heads": 2, "num_local_experts": 4, "num_hidden_layers": 2}),
        "Mixtral", seed=seed,
    )  # fmt: skip


def bert(seed=0):
    return _build(("BertModel", {**_COMMON, "num_hidden_layers": 2}), "Bert", seed=seed)


def albert(seed=0):
    return _build(("AlbertModel", {**_COMMON, "embedding_size": 16, "num_hidden_layers": 3}), "Albert", seed=seed)


def t5(seed=0):
    config = {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0,
    }  # fmt: skip
    return _build(("T5ForConditionalGeneration", config), "T5", seed=seed)


def vit(seed=0):
    config = {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    return _build(("ViTModel", config), "ViT", seed=seed)


class Mlp(nn.Module):
    """Features [B, 8] in, [B, 4] out: no token axis anywhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.second = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(self.act(self.first(x)))


class ConvNet(nn.Module):
    """Images [B, 3, 8, 8] in, classes out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.act = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.act(self.norm(self.conv(x))).mean(dim=(2, 3)))


class Says(nn.Module):
    """Return the next line of a script, whatever it is called with."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=False)

    def forward(self, samples):
        return self.values[samples]


class Scripted(nn.Module):
    """A model whose layer i gives exactly `script[i]` [N, T, C]: a batch [B, T] has the sample's number in front."""

    def __init__(self, *script):
        super().__init__()
        self.layers = nn.ModuleList(Says(torch.as_tensor(values)) for values in script)

    def forward(self, input_ids, attention_mask=None):
        out = None
        for layer in self.layers:
            out = layer(input_ids[:, 0])
        return out


def numbered(model, first=0, stop=None):
    """Return the batch that makes a Scripted model say its samples from `first` up to `stop`."""
    count, length = model.layers[0].values.shape[:2]
    return torch.arange(first, count if stop is None else stop)[:, None].expand(-1, length)


def token_batch(rows, length, seed=0, bos=False):
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    if bos:
        ids[:, 0] = BOS
    return ids


def padded_batch(lengths, side="right", seed=0, bos=False):
    """Return a dict batch whose rows have these numbers of tokens, padded on the given side."""
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, at] = token_batch(1, length, seed + row, bos)[0]
        mask[row, at] = 1
    return {"input_ids": ids, "attention_mask": mask}


SPECIAL = ("plain", "zeros", "nan and inf", "two tokens", "tiny", "no token axis")


def special_rows(count, special):
    """Return populations [count, 40, 24] whose channels spread differently, with something `SPECIAL` about them."""
    x = torch.randn(count, 40, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 5, 24)
    if special == "zeros":
        x[0, 3], x[1] = 0, 0
    elif special == "nan and inf":
        x[1, 2, 3], x[2, 1, 1] = float("nan"), float("inf")
    elif special == "two tokens":
        x = x[:, :2]
    elif special == "tiny":
        x = x * 1e-4
    elif special == "no token axis":
        x = x.flatten(1)
    return x


def record(model, batches, layer, site, *, mask=None, tokens=None):
    """Return the populations of a site as float64 arrays, by plain hooks: batch by batch, call by call, row by row.

    `mask`: the key of the batch that says which tokens count. `tokens`: T, where rows and tokens share an axis.
    """
    calls = []

    def hook(module, args, kwargs, output):
        value = output if site == "output" else next(iter([*args, *kwargs.values()]))
        calls.append((value[0] if isinstance(value, (tuple, list)) else value).detach().clone())

    populations = []
    device = next(model.parameters()).device
    handle = model.get_submodule(layer).register_forward_hook(hook, with_kwargs=True)
    try:
        for batch in batches:
            calls.clear()
            with torch.no_grad():
                run_batch(model, batch, device)
            for call in calls:
                value = call.double().cpu().numpy()
                value = value.reshape(-1, tokens, value.shape[-1]) if tokens else value
                keep = batch[mask].numpy().astype(bool) if mask else None
                populations += [row if keep is None else row[keep[index]] for index, row in enumerate(value)]
    finally:
        handle.remove()
    return populations


def damaged(model, strength=0.05, names=("proj",), seed=3):
    """Return a copy whose named weights have noise of that share of their own spread."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if any(part in name for part in names):
                parameter.add_(torch.randn_like(parameter) * parameter.std() * strength)
    return other


_TINY_MOE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "tie_word_embeddings": False,
}  # fmt: skip
_DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
_LLAMA4 = {
    "num_local_experts": 4, "intermediate_size_mlp": 48, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
    "attention_chunk_size": 32, "head_dim": 8,
}  # fmt: skip
MIXTURES = {
    "mixtral": ("Mixtral", "Mixtral", {"num_local_experts": 4}),
    "qwen3": ("Qwen3Moe", "Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "gpt_oss": ("GptOss", "GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "deepseek": ("DeepseekV3", "DeepseekV3", _DEEPSEEK),
    "llama4": ("Llama4", "Llama4Text", _LLAMA4),
}
"""Mixtures of experts: the model, its configuration, and what makes it small."""


def mixture(kind, seed=0):
    """Return a small mixture of 4 experts, in float32, whose packed weights are random too."""
    model, config, sizes = MIXTURES[kind]
    made = _build((f"{model}ForCausalLM", {**_TINY_MOE, **sizes}), config, seed=seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 3:
                parameter.normal_(0, 0.2)
    return made
