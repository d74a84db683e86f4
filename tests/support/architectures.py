"""Small checkpoints of other tasks and kinds of block than a language model's."""


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=320, decoder_start_token_id=0, **sizes))


def bert():
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForMaskedLM(BertConfig(vocab_size=320, **sizes))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return MixtralForCausalLM(MixtralConfig(vocab_size=320, num_key_value_heads=2, num_local_experts=4, **sizes))


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    text = LlamaConfig(vocab_size=320, num_key_value_heads=2, **sizes)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=319))


MODELS = {"t5": t5, "bert": bert, "mixtral": mixtral, "llava": llava}
