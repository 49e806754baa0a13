"""Tiny random models of every known architecture, and batches for them."""

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jaxtyping

# Shapes in the signatures of the mathematics are checked in tests, before its first import.
jaxtyping.install_import_hook("solpath.searching.dynamics", "beartype.beartype")

import pytest
import torch
import transformers
from torch import nn

from solpath.running.forward import output_tensor

torch.set_num_threads(1)

# Awkward on purpose: odd inner widths, heads that do not divide them.
SIZES: dict[str, object] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48}
TOWER: dict[str, object] = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 6}
TOWER |= {"intermediate_size": 43}
TEXT: dict[str, object] = {"vocab_size": 60, "max_position_embeddings": 40, "pad_token_id": 0}
IMAGE: dict[str, object] = {"image_size": 8, "patch_size": 4, "num_channels": 1}
STAGES: dict[str, object] = {"out_indices": [1, 2], "pool_scales": [1, 2]}  # what JSON gives back
EOS: dict[str, object] = {"bos_token_id": 58, "eos_token_id": 59, "projection_dim": 12}
GEMMA: dict[str, object] = {"num_key_value_heads": 2, "head_dim": 10, "sliding_window": 4}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16}
POSITIONS: dict[str, object] = {"relative_attention": True, "position_biased_input": False}
POSITIONS |= {"pos_att_type": ["p2c", "c2p"]}
TWO_SIDES: dict[str, object] = {"vocab_size": 60, "d_model": 36, "max_position_embeddings": 40}
TWO_SIDES |= {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 43}
TWO_SIDES |= {"decoder_layers": 2, "decoder_attention_heads": 3, "decoder_ffn_dim": 31}
TWO_SIDES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
TWO_SIDES |= {"forced_eos_token_id": None}

SOUND: dict[str, object] = {"conv_dim": [8, 24], "conv_stride": [5, 2], "conv_kernel": [10, 3]}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 20}
SOUND |= {"hidden_size": 36, "num_hidden_layers": 1, "num_attention_heads": 6}
SOUND |= {
    "apply_spec_augment": False,
    "intermediate_size": 43,
    "num_feat_extract_layers": 2,
    "pad_token_id": 0,
}
LAYERS: dict[str, object] = {"tdnn_dim": [8], "tdnn_kernel": [3], "tdnn_dilation": [1]}  # lists
EXPERTS: dict[str, object] = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
EXPERTS |= {"num_local_experts": 4, "experts_implementation": "eager"}  # float64 has no other
VISION: dict[str, object] = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32}
VISION |= {"intermediate_size": 16, "in_channels": 1, "patch_size": 4}


def rope(*sections: int) -> dict[str, object]:
    """Rotary couples for time, height and width."""
    return {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [*sections]}


# Class and sizes of the models to build for a type; every known type must be here. What follows
# the type in a label tells several cases of it apart.
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "albert": (
        "AlbertForMaskedLM",
        TOWER | TEXT | {"embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2},
    ),
    "albert inner": (  # a group of two layers that runs three times
        "AlbertModel",
        TOWER | TEXT | {"embedding_size": 16, "num_hidden_layers": 3, "inner_group_num": 2},
    ),
    "bart": ("BartForConditionalGeneration", TWO_SIDES),
    "audio-spectrogram-transformer": (
        "ASTForAudioClassification",
        TOWER | {"max_length": 14, "num_mel_bins": 10, "patch_size": 4, "time_stride": 5,
                 "frequency_stride": 3},
    ),
    "beit": (
        "BeitForImageClassification",
        TOWER | IMAGE | STAGES | {"use_relative_position_bias": True},
    ),
    "beit shared": (
        "BeitForMaskedImageModeling",
        TOWER | IMAGE | STAGES | {"use_shared_relative_position_bias": True, "vocab_size": 20},
    ),
    "bert": ("BertModel", SIZES | TEXT),
    "bert one head": (
        "BertModel",
        TEXT | {"hidden_size": 15, "num_hidden_layers": 1, "num_attention_heads": 1,
                "intermediate_size": 31},
    ),
    "bert-generation": ("BertGenerationEncoder", TOWER | TEXT),
    "big_bird": (
        "BigBirdModel",
        TOWER | TEXT | {"attention_type": "original_full", "use_bias": False},
    ),
    "blenderbot": ("BlenderbotForConditionalGeneration", TWO_SIDES),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration", TWO_SIDES),
    "bloom": (
        "BloomForCausalLM",
        {"vocab_size": 60, "hidden_size": 36, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
    ),
    "camembert": ("CamembertForSequenceClassification", SIZES | TEXT),
    "clip": ("CLIPModel", {"text_config": TOWER | TEXT | EOS, "vision_config": TOWER | IMAGE,
                           "projection_dim": 12}),
    "clip_text_model": ("CLIPTextModelWithProjection", TOWER | TEXT | EOS),
    "clip_vision_model": ("CLIPVisionModelWithProjection", TOWER | IMAGE),
    "cohere": ("CohereForCausalLM", SIZES | TEXT | {"num_key_value_heads": 2, "logit_scale": 1.0}),
    "cohere2": (
        "Cohere2ForCausalLM",
        SIZES | TEXT | {"num_key_value_heads": 2, "logit_scale": 1.0, "sliding_window": 4,
                        "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "data2vec-text": ("Data2VecTextForMaskedLM", TOWER | TEXT),
    "data2vec-audio": ("Data2VecAudioForCTC", SOUND | LAYERS),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        TOWER | TEXT | POSITIONS | {"share_att_key": True, "position_buckets": 4,
                                    "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
    ),
    "deberta-v2 apart": ("DebertaV2ForTokenClassification", TOWER | TEXT | POSITIONS),
    "deberta-v2 absolute": ("DebertaV2Model", TOWER | TEXT),
    "data2vec-vision": (  # its attention has a class of its own for each implementation
        "Data2VecVisionForImageClassification",
        TOWER | IMAGE | STAGES | {"attn_implementation": "eager"}
        | dict.fromkeys(("use_relative_position_bias", "use_shared_relative_position_bias"), True),
    ),
    "deit": ("DeiTForImageClassificationWithTeacher", SIZES | IMAGE),
    "dinov2": ("Dinov2ForImageClassification", TOWER | IMAGE | {"mlp_ratio": 2}),
    "dinov2 gated": ("Dinov2Model", TOWER | IMAGE | {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2_with_registers": (
        "Dinov2WithRegistersForImageClassification",
        TOWER | IMAGE | {"mlp_ratio": 2, "num_register_tokens": 3},
    ),
    "dinov3_vit": (
        "DINOv3ViTModel",
        TOWER | IMAGE | {"num_attention_heads": 3, "num_register_tokens": 3},
    ),
    "dinov3_vit gated": (
        "DINOv3ViTModel",
        TOWER | IMAGE | {"num_attention_heads": 3, "use_gated_mlp": True, "query_bias": False},
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 60, "dim": 36, "n_heads": 4, "n_layers": 2, "hidden_dim": 43},
    ),
    "electra": ("ElectraForTokenClassification", SIZES | TEXT | {"embedding_size": 16}),
    "ernie": ("ErnieForSequenceClassification", TOWER | TEXT | {"use_task_id": True}),
    "ernie4_5": (
        "Ernie4_5ForCausalLM",
        TOWER | TEXT | {"num_key_value_heads": 2, "head_dim": 10, "use_bias": True},
    ),
    "esm": (
        "EsmForTokenClassification",
        TOWER | TEXT | {"position_embedding_type": "rotary", "mask_token_id": 58},
    ),
    "esm absolute": (
        "EsmModel",
        TOWER | TEXT | {"mask_token_id": 58, "emb_layer_norm_before": True},
    ),
    "eurobert": ("EuroBertForMaskedLM", SIZES | TEXT | {"num_key_value_heads": 2}),
    "falcon": (
        "FalconForCausalLM",
        {"vocab_size": 60, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
         "ffn_hidden_size": 43, "pad_token_id": 0},
    ),
    "falcon one to one": (
        "FalconForCausalLM",
        {"vocab_size": 60, "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 6,
         "multi_query": False, "parallel_attn": False, "bias": True, "pad_token_id": 0},
    ),
    "gemma": ("GemmaForCausalLM", TOWER | TEXT | {"num_key_value_heads": 1, "head_dim": 10}),
    "gemma2": (
        "Gemma2ForCausalLM",
        TOWER | TEXT | GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 30.0,
                                # Padding sees a token, 7 tokens away at most, of 9.
                                "sliding_window": 7},
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": TOWER | TEXT | GEMMA, "vision_config": TOWER | IMAGE,
         "mm_tokens_per_image": 4, "image_token_index": 59, "boi_token_index": 58,
         "eoi_token_index": 57},
    ),
    "gemma3_text": ("Gemma3ForCausalLM", TOWER | TEXT | GEMMA),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 60, "n_positions": 40, "n_embd": 36, "n_layer": 2, "n_head": 4,
         "n_inner": 43, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        TOWER | TEXT | {"num_attention_heads": 4,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                                            "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox sequential": (
        "GPTNeoXForCausalLM",
        TOWER | TEXT | {"use_parallel_residual": False, "attention_bias": False,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                                            "partial_rotary_factor": 1.0}},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        SIZES | TEXT | EXPERTS | {"head_dim": 10, "sliding_window": 4, "attention_bias": True,
                                  "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "granite": (
        "GraniteForCausalLM",
        TOWER | TEXT | {"num_key_value_heads": 3, "attention_multiplier": 0.3,
                        "residual_multiplier": 0.7, "logits_scaling": 2.0},
    ),
    "helium": ("HeliumForCausalLM", SIZES | TEXT | {"num_key_value_heads": 2, "head_dim": 8}),
    "hubert": ("HubertForSequenceClassification", SOUND),
    "layoutlm": (
        "LayoutLMModel", TOWER | TEXT | {"max_2d_position_embeddings": 20}
    ),
    "ijepa": ("IJepaForImageClassification", TOWER | IMAGE),
    "llama": ("LlamaForCausalLM", SIZES | TEXT | {"num_key_value_heads": 2}),
    "llama 1:6": (
        "LlamaForCausalLM",
        TEXT | {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6,
                "num_key_value_heads": 1, "head_dim": 10, "intermediate_size": 37,
                "attention_bias": True},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {"text_config": SIZES | TEXT | {"num_key_value_heads": 2, "model_type": "llama"},
         "vision_config": TOWER | IMAGE | {"model_type": "clip_vision_model"},
         "image_token_index": 59, "vision_feature_layer": -1, "image_seq_length": 4},
    ),
    "m2m_100": ("M2M100ForConditionalGeneration", TWO_SIDES),
    "marian": ("MarianMTModel", TWO_SIDES | {"scale_embedding": True}),
    "mbart": ("MBartForConditionalGeneration", TWO_SIDES),
    "megatron-bert": ("MegatronBertForMaskedLM", TOWER | TEXT),
    "ministral": (
        "MinistralForCausalLM",
        TOWER | TEXT | {"num_key_value_heads": 3, "head_dim": 10, "sliding_window": 4,
                        "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "ministral3": (
        "Ministral3ForCausalLM",
        TOWER | TEXT | {"num_key_value_heads": 2, "head_dim": 10, "sliding_window": 4,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                                            "llama_4_scaling_beta": 0.5,
                                            "original_max_position_embeddings": 3}},
    ),
    "mistral": (
        "MistralForCausalLM", TOWER | TEXT | {"num_key_value_heads": 3, "sliding_window": 4}
    ),
    "mixtral": ("MixtralForCausalLM", SIZES | TEXT | EXPERTS | {"sliding_window": 4}),
    "modernbert": (
        "ModernBertForMaskedLM",
        TOWER | TEXT | {"layer_types": ["sliding_attention", "full_attention"],
                        # Padding sees a token: 7 tokens away at most, of 9.
                        "local_attention": 12, "attention_bias": True},
    ),
    "mpnet": ("MPNetForMaskedLM", TOWER | TEXT),
    "mt5": (
        "MT5ForConditionalGeneration",
        {"vocab_size": 60, "d_model": 32, "d_kv": 7, "d_ff": 43, "num_layers": 2, "num_heads": 3,
         "decoder_start_token_id": 0},
    ),
    "olmo": ("OlmoForCausalLM", SIZES | TEXT | {"num_key_value_heads": 2}),
    "olmo2": ("Olmo2ForCausalLM", SIZES | TEXT | {"num_key_value_heads": 2}),
    "olmo3": (
        "Olmo3ForCausalLM",
        SIZES | TEXT | {"num_key_value_heads": 1, "sliding_window": 4,
                        "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": 60, "max_position_embeddings": 40, "hidden_size": 36, "ffn_dim": 43,
         "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 16,
         "pad_token_id": 0},
    ),
    "pegasus": ("PegasusForConditionalGeneration", TWO_SIDES),
    "phi": (
        "PhiForCausalLM",
        TOWER | TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                                            "partial_rotary_factor": 0.5}},
    ),
    "phi3": (
        "Phi3ForCausalLM", TOWER | TEXT | {"num_key_value_heads": 3, "sliding_window": 4}
    ),
    "phi3 partial": (
        "Phi3ForCausalLM",
        TOWER | TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                                            "partial_rotary_factor": 0.75}},
    ),
    "plbart": ("PLBartForConditionalGeneration", TWO_SIDES),
    "qwen2": ("Qwen2ForCausalLM", SIZES | TEXT | {"num_key_value_heads": 2}),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": SIZES | TEXT | {"num_key_value_heads": 2, "rope_parameters": rope(2, 1, 1)},
         "vision_config": VISION | {"fullatt_block_indexes": [0]}},
    ),
    "qwen2_moe": (  # one block with experts and one without, or without the shared expert
        "Qwen2MoeForCausalLM",
        SIZES | TEXT | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 8,
                                  "shared_expert_intermediate_size": 21, "mlp_only_layers": [1]},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {"text_config": SIZES | TEXT | {"num_key_value_heads": 1, "rope_parameters": rope(2, 1, 1)},
         "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32,
                           "in_channels": 1, "patch_size": 4}},
    ),
    "qwen3": (
        "Qwen3ForCausalLM", SIZES | TEXT | {"num_key_value_heads": 1, "head_dim": 10}
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        SIZES | TEXT | EXPERTS | {"head_dim": 10, "num_experts": 4, "moe_intermediate_size": 8,
                                  "mlp_only_layers": [1]},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {"text_config": SIZES | TEXT | {"num_key_value_heads": 2, "head_dim": 10,
                                        "rope_parameters": rope(1, 2, 2)},
         "vision_config": VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 4}},
    ),
    "rembert": (
        "RemBertModel",
        TOWER | TEXT | {"input_embedding_size": 20, "output_embedding_size": 14},
    ),
    "roberta": ("RobertaForMaskedLM", SIZES | TEXT),
    "roberta-prelayernorm": ("RobertaPreLayerNormForMaskedLM", TOWER | TEXT),
    "seed_oss": ("SeedOssForCausalLM", TOWER | TEXT | {"num_key_value_heads": 2, "head_dim": 10}),
    "siglip": ("SiglipModel", {"text_config": TOWER | TEXT | EOS,
                               "vision_config": TOWER | IMAGE}),
    "siglip2": ("Siglip2Model", {"text_config": TOWER | TEXT | EOS,
                                 "vision_config": TOWER | IMAGE | {"num_patches": 16}}),
    "siglip2_text_model": ("Siglip2TextModel", TOWER | TEXT | EOS),
    "siglip2_vision_model": ("Siglip2VisionModel", TOWER | IMAGE | {"num_patches": 16}),
    "siglip_text_model": ("SiglipTextModel", TOWER | TEXT | EOS),
    "siglip_vision_model": ("SiglipVisionModel", TOWER | IMAGE),
    "smollm3": (
        "SmolLM3ForCausalLM",
        TOWER | TEXT | {"num_key_value_heads": 3, "no_rope_layers": [1, 0],
                        "layer_types": ["sliding_attention", "full_attention"],
                        "use_sliding_window": True, "sliding_window": 4},
    ),
    "starcoder2": (
        "Starcoder2ForCausalLM", TOWER | TEXT | {"num_key_value_heads": 3, "sliding_window": 4}
    ),
    "swin": (
        "SwinForImageClassification",
        # 8 x 8 patches, then 4 x 4, in windows of 3: padded, and shifted in every second block.
        {"image_size": 16, "patch_size": 2, "num_channels": 1, "embed_dim": 12, "depths": [2, 1],
         "num_heads": [2, 3], "window_size": 3, "mlp_ratio": 1.7},
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        {"pretrained_window_sizes": [0, 0, 0, 0],
         "image_size": 16, "patch_size": 2, "num_channels": 1, "embed_dim": 12, "depths": [2, 1],
         "num_heads": [2, 3], "window_size": 3, "mlp_ratio": 1.7},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 60, "d_model": 32, "d_kv": 5, "d_ff": 43, "num_layers": 2, "num_heads": 3,
         "decoder_start_token_id": 0, "tie_word_embeddings": False},
    ),
    "t5 gated": (
        "T5ForConditionalGeneration",
        {"vocab_size": 60, "d_model": 32, "d_kv": 10, "d_ff": 43, "num_layers": 1, "num_heads": 4,
         "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
    ),
    "umt5": (
        "UMT5ForConditionalGeneration",
        {"vocab_size": 60, "d_model": 32, "d_kv": 7, "d_ff": 43, "num_layers": 2, "num_heads": 3,
         "decoder_start_token_id": 0},
    ),
    "videomae": ("VideoMAEForVideoClassification", TOWER | IMAGE | {"num_frames": 4}),
    "vit": ("ViTForImageClassification", SIZES | IMAGE),
    "vit_mae": ("ViTMAEModel", TOWER | IMAGE | {"mask_ratio": 0.5}),
    "vit_msn": ("ViTMSNForImageClassification", TOWER | IMAGE),
    "vivit": (
        "VivitForVideoClassification",
        TOWER | IMAGE | {"num_frames": 4, "tubelet_size": [2, 4, 4]},
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", SOUND | LAYERS | {"do_stable_layer_norm": True}),
    "wavlm": ("WavLMForCTC", SOUND | LAYERS),
    "whisper": (
        "WhisperForConditionalGeneration",
        {"vocab_size": 60, "num_mel_bins": 6, "d_model": 36, "encoder_layers": 1,
         "encoder_attention_heads": 4, "decoder_layers": 2, "decoder_attention_heads": 3,
         "encoder_ffn_dim": 43, "decoder_ffn_dim": 31, "max_source_positions": 7,
         "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
    "xlm-roberta": ("XLMRobertaModel", SIZES | TEXT),
    "xlm-roberta-xl": ("XLMRobertaXLModel", TOWER | TEXT),
    "yolos": (
        "YolosModel",
        TOWER | IMAGE | {"image_size": [8, 8], "num_detection_tokens": 3},
    ),
}  # fmt: skip

# Types with nothing that another type does not have too for searches, tuning, compensation and
# runtimes, which are not tested with them.
KIN = {"data2vec-audio", "gpt_oss", "hubert", "olmo3", "qwen2_5_vl", "qwen2_moe"}
KIN |= {"qwen2_vl", "qwen3_moe", "qwen3_vl", "swinv2", "wav2vec2", "wavlm"}
KIN |= {"bert-generation", "blenderbot", "camembert", "data2vec-text", "plbart", "vit_msn"}
KIN |= {"xlm-roberta", "xlm-roberta-xl"}
COMMON = [label for label in CASES if label not in KIN]

# Shape of one sample of types that take neither text nor an image of 8 x 8.
SAMPLES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("data2vec-audio", "hubert", "wav2vec2", "wavlm"), (100,)),
    "audio-spectrogram-transformer": (14, 10),
    "videomae": (4, 1, 8, 8),
    "vivit": (4, 1, 8, 8),
}

# Likewise for timm, which need not be installed: name of a model, and its sizes.
VIT: dict[str, object] = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 5}
VIT |= {"embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 1.8}
# 8 x 8 patches, then 4 x 4, in windows of 3: padded, and shifted in every second block.
WINDOWS: dict[str, object] = {"img_size": 16, "patch_size": 2, "in_chans": 1, "num_classes": 5}
WINDOWS |= {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": 3}
WINDOWS |= {"mlp_ratio": 1.7}
TIMM_CASES: dict[str, tuple[str, dict[str, object]]] = {
    "timm/SwinTransformer": ("swin_tiny_patch4_window7_224", WINDOWS),
    "timm/SwinTransformer wide heads": (
        "swin_tiny_patch4_window7_224",
        WINDOWS | {"depths": [2, 1], "head_dim": 7, "qkv_bias": False, "strict_img_size": False},
    ),
    "timm/VisionTransformer": ("vit_tiny_patch16_224", VIT),
    "timm/VisionTransformer registers": (
        "vit_small_patch16_224",
        VIT | {"num_heads": 2, "qkv_bias": False, "proj_bias": False, "class_token": False,
               "reg_tokens": 2, "init_values": 0.1, "global_pool": "avg"},
    ),
    "timm/VisionTransformerDistilled": ("deit_tiny_distilled_patch16_224", VIT),
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="how long all attacks take together")


SHORT = 1.0  # seconds that an attack may take among all other tests


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """How long one attack may take: its share of ``--minutes``, or what suits the whole suite."""
    minutes = request.config.getoption("--minutes")
    attacks = sum("seconds" in item.fixturenames for item in request.session.items)
    return SHORT if minutes is None else 60 * minutes / attacks


def build(label: str, *, seed: int = 0, **changes: object) -> nn.Module:
    """A tiny random model in eval mode. All weights, biases too, are of order one."""
    name, sizes = CASES[label]
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    return randomise_(cls(cls.config_class(**copy.deepcopy(sizes) | changes)).eval())


def randomise_(model: nn.Module) -> nn.Module:
    """Draw all parameters, biases too, but the sinusoids that transformers freezes."""
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.5)
    return model


def inputs(
    model: nn.Module, *, samples: int = 4, seed: int = 0
) -> dict[str, torch.Tensor] | torch.Tensor:
    """One batch; texts are padded to different lengths."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    kind = model.config.model_type if hasattr(model, "config") else "timm"
    size = 16 if kind in ("swin", "swinv2", "timm", "timm_wrapper") else 8
    images = {"pixel_values": torch.randn(samples, 1, size, size, generator=generator).to(dtype)}
    if kind == "timm":  # a bare model, which takes a tensor
        return images["pixel_values"]
    if kind in SAMPLES:
        shape = (samples, *SAMPLES[kind])
        return {model.main_input_name: torch.randn(shape, generator=generator).to(dtype)}
    if kind == "vit_mae":  # which patches it does not see
        return images | {"noise": torch.rand(samples, 4, generator=generator)}
    if kind == "whisper":
        sound = {"input_features": torch.randn(samples, 6, 14, generator=generator).to(dtype)}
        return sound | {"decoder_input_ids": _tokens(samples, generator)["input_ids"]}
    text = _tokens(samples, generator)
    if kind in ("siglip2", "siglip2_vision_model"):  # patches of images of different sizes, padded
        sizes = torch.tensor([[2, 3], [1, 4], [3, 2], [2, 1]]).repeat(samples, 1)[:samples]
        mask = (torch.arange(6) < sizes.prod(1, keepdim=True)).long()
        patches = torch.randn(samples, 6, 16, generator=generator).to(dtype)
        images = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": sizes}
    if kind in ("clip", "clip_text_model"):  # the text is read off where its end is marked
        text["input_ids"].scatter_(1, text["attention_mask"].sum(1, keepdim=True) - 1, 59)
    if kind in ("clip", "siglip", "siglip2"):
        return text | images
    if kind in ("gemma3", "llava"):
        image = torch.full((samples, 4), 59)
        tokens = torch.cat([image, text["input_ids"]], 1)
        mask = torch.cat([torch.ones_like(image), text["attention_mask"]], 1)
        return {"input_ids": tokens, "attention_mask": mask} | images
    if model.config.is_encoder_decoder:
        return text | {"decoder_input_ids": _tokens(samples, generator)["input_ids"]}
    return images if model.main_input_name == "pixel_values" else text


def _tokens(samples: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, 57, (samples, 9), generator=generator)
    lengths = torch.randint(3, 10, (samples, 1), generator=generator)
    mask = (torch.arange(9) < lengths).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def batches(model: nn.Module, count: int = 3, samples: int = 4) -> list:
    """A few different batches."""
    return [inputs(model, samples=samples, seed=i) for i in range(count)]


def size_of_output(outputs: object, batch: object) -> torch.Tensor:
    """A loss without labels that every model has."""
    return output_tensor(outputs).square().mean()


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Every known architecture in turn."""
    return build(request.param)


@pytest.fixture(params=COMMON)
def common_model(request: pytest.FixtureRequest) -> nn.Module:
    """Every known architecture but kin in turn."""
    return build(request.param)


@pytest.fixture
def bert() -> nn.Module:
    """The architecture most tests of searching use."""
    return build("bert")
