"""Small checkpoints of other tasks, modalities and kinds of block than a language model's, with random weights."""

from __future__ import annotations

import json
from importlib.util import find_spec

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VOCABULARY = 320
IMAGE, AUDIO = 319, 318
"""The token ids that stand for a part of a picture or of a sound."""
MARKS = {"<image>": IMAGE, "<|AUDIO|>": AUDIO, "<soi>": 317, "<eoi>": 316, "<video>": 315}
"""Tokens that the tests' tokenizer of 320 entries holds as its last ones (`save_processor`)."""


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=320, decoder_start_token_id=0, **sizes))


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(vocab_size=320, **{**SIZES, "num_hidden_layers": 3}))


def modernbert():
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    return ModernBertForMaskedLM(ModernBertConfig(vocab_size=320, pad_token_id=0, **SIZES))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(vocab_size=320, num_key_value_heads=2, num_local_experts=4, **SIZES))


def jamba():
    """Blocks of two classes in one list: state spaces and attention."""
    from transformers import JambaConfig, JambaForCausalLM

    return JambaForCausalLM(
        JambaConfig(
            vocab_size=320,
            num_key_value_heads=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            mamba_dt_rank=4,
            mamba_d_state=8,
            use_mamba_kernels=False,
            **{**SIZES, "num_hidden_layers": 4},
        )
    )


def mamba2():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=320, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=2,
            chunk_size=16,
        )
    )  # fmt: skip


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=8))


def deepseek():
    """Latent attention, and experts."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=320,
            num_key_value_heads=4,
            topk_group=1,
            first_k_dense_replace=1,
            num_nextn_predict_layers=0,
            **latent,
            **experts,
            **SIZES,
        )
    )


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(vocab_size=320, num_key_value_heads=2, head_dim=8, **experts, **SIZES))


def gemma3n():
    """A residual stream of several copies (AltUp)."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    return Gemma3nForCausalLM(
        Gemma3nTextConfig(
            vocab_size=320, vocab_size_per_layer_input=320, hidden_size_per_layer_input=8, laurel_rank=8,
            num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"] * 2, num_key_value_heads=2,
            head_dim=8, activation_sparsity_pattern=[0.0] * 4, pad_token_id=0,
            **{**SIZES, "intermediate_size": [64] * 4, "num_hidden_layers": 4},
        )
    )  # fmt: skip


def _clip_vision():
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(image_size=32, patch_size=8, **SIZES)


def llava():
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(vocab_size=320, num_key_value_heads=2, **SIZES)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=_clip_vision(), text_config=text, image_token_index=IMAGE)
    )


def qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**SIZES, "vocab_size": 320, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32,
              "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_QWEN_MARKS))


_QWEN_MARKS = {"image_token_id": IMAGE, "video_token_id": 315, "vision_start_token_id": 317, "vision_end_token_id": 316}


def qwen3_vl():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "mrope_interleaved": True}
    text = {**SIZES, "vocab_size": 320, "num_key_value_heads": 2, "head_dim": 8, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32,
              "patch_size": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}  # fmt: skip
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_MARKS))


def gemma3():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    text = {**SIZES, "vocab_size": 320, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    vision = SiglipVisionConfig(image_size=32, patch_size=8, **SIZES)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=IMAGE, boi_token_id=317,
            eoi_token_id=316,
        )
    )  # fmt: skip


def clip():
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    text = CLIPTextConfig(
        vocab_size=320, max_position_embeddings=64, projection_dim=16, eos_token_id=1, bos_token_id=0, **SIZES
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=_clip_vision().to_dict(), projection_dim=16))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **SIZES))


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=320, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16,
            max_source_positions=100, max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=3,
        )
    )  # fmt: skip


def qwen2_audio():
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
             "num_mel_bins": 16, "max_source_positions": 100, "model_type": "qwen2_audio_encoder"}  # fmt: skip
    text = {**SIZES, "vocab_size": 320, "num_key_value_heads": 2, "model_type": "qwen2"}
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO)
    )


MODELS = {"t5": t5, "bert": bert, "mixtral": mixtral, "llava": llava}
TEXT = {**MODELS, "modernbert": modernbert, "jamba": jamba, "mamba2": mamba2, "mamba": mamba, "deepseek": deepseek,
        "gpt_oss": gpt_oss, "gemma3n": gemma3n}  # fmt: skip
SEEN_OR_HEARD = {"llava": llava, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "gemma3": gemma3, "clip": clip,
                 "vit": vit, "whisper": whisper, "qwen2_audio": qwen2_audio}  # fmt: skip
ALL = TEXT | SEEN_OR_HEARD


def saved(name, folder):
    """Save the checkpoint of an architecture with its processor, or its tokenizer; return its folder."""
    import torch

    from support.checkpoints import save_tokenizer

    model = ALL[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # what training would have moved: Gemma 3n's scales begin at 0
            if not parameter.any():
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    if name in PROCESSORS:
        PROCESSORS[name](folder).save_pretrained(folder)
    return folder


def _marked(folder, **named):
    """Return the tokenizer of a folder, whose last entries are the marks of pictures and sounds."""
    from transformers import AutoTokenizer

    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    last = [piece for piece, token in content["model"]["vocab"].items() if token in MARKS.values()]
    for piece in last:
        del content["model"]["vocab"][piece]
    content["model"]["merges"] = [
        pair for pair in content["model"]["merges"] if "".join(pair) not in last and not {*pair} & {*last}
    ]
    form = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] += [
        {"id": token, "content": text, **form} for text, token in sorted(MARKS.items(), key=lambda mark: mark[1])
    ]
    file.write_text(json.dumps(content), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder, extra_special_tokens=named)


def _pictures(**options):
    from transformers import CLIPImageProcessor

    square = {"height": 32, "width": 32}
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square, **options)


def _llava(folder):
    from transformers import LlavaProcessor

    tokenizer = _marked(folder, image_token="<image>")
    return LlavaProcessor(
        _pictures(), tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _gemma3(folder):
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    tokenizer = _marked(folder, image_token="<image>", boi_token="<soi>", eoi_token="<eoi>")
    pictures = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return Gemma3Processor(pictures, tokenizer, image_seq_length=4)


def _clip(folder):
    from transformers import AutoTokenizer, CLIPProcessor

    return CLIPProcessor(_pictures(), AutoTokenizer.from_pretrained(folder))


def _sounds():
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=16, chunk_length=2)


def _whisper(folder):
    return _sounds()


def _qwen2_audio(folder):
    from transformers import Qwen2AudioProcessor

    tokenizer = _marked(folder, audio_token="<|AUDIO|>")
    return Qwen2AudioProcessor(_sounds(), tokenizer)


def _qwen_vl(folder):
    """Those of Qwen2.5-VL and Qwen3-VL: patches of 4 pixels, four of them a token. They need torchvision."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    marks = {"image": "<image>", "video": "<video>", "vision_bos": "<soi>", "vision_eos": "<eoi>"}
    tokenizer = _marked(folder, **{f"{name}_token": text for name, text in marks.items()})
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}
    pictures, videos = (
        kind(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
        for kind in (Qwen2VLImageProcessor, Qwen2VLVideoProcessor)
    )
    part = "{% if c.type == 'image' %}<soi><image><eoi>{% else %}{{ c.text }}{% endif %}"
    template = f"{{% for m in messages %}}{{% for c in m.content %}}{part}{{% endfor %}}{{% endfor %}}"
    return Qwen2_5_VLProcessor(pictures, tokenizer, videos, chat_template=template)


PROCESSORS = {"llava": _llava, "gemma3": _gemma3, "clip": _clip, "vit": lambda folder: _pictures(),
              "whisper": _whisper, "qwen2_audio": _qwen2_audio}  # fmt: skip
"""Those of the models that see or hear."""
if find_spec("torchvision"):
    PROCESSORS |= {"qwen2_5_vl": _qwen_vl, "qwen3_vl": _qwen_vl}
