"""Tiny random models of the architectures that hiplora promises to adapt, made from transformers' configurations."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoConfig

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
QWEN_MOE = {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
NEMOTRON = {"layers_block_type": ["attention", "mamba", "moe"], "n_routed_experts": 4, "mamba_num_heads": 4}
NEMOTRON |= {"moe_shared_expert_intermediate_size": 16, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1}
LINEAR = {f"linear_{kind}": 2 for kind in ("num_key_heads", "num_value_heads")}
LINEAR |= {f"linear_{kind}": 8 for kind in ("key_head_dim", "value_head_dim")}
BART = {f"{side}_{kind}": size for side in ("encoder", "decoder") for kind, size in (("layers", 2), ("ffn_dim", 48))}
BART |= {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
MPT = {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64}
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
CTRL = {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
ALTERNATING = [[["global", "local"], 1]]
RECURRENT = {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3}
LFM2 = {"block_ff_dim": 48, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
NEXT = {"shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]}
CLIP = {**VISION, "model_type": "clip_vision_model", "num_hidden_layers": 2, "projection_dim": 32}
LLAVA = {"text_config": {"model_type": "llama", **SIZES}, "vision_config": CLIP}
CROSSED = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_global_layers": 1}
CROSSED |= {"attention_heads": 4, "image_size": 16, "patch_size": 8, "intermediate_layers_indices": [0]}
CROSSED |= {"vision_output_dim": 64}
GEMMA_3 = {"text_config": {"model_type": "gemma3_text", **SIZES}, "mm_tokens_per_image": 4}
GEMMA_3["vision_config"] = {**VISION, "num_hidden_layers": 1}
ZAMBA2 = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]}
ZAMBA2 |= {"mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "chunk_size": 8, "adapter_rank": 8}
ZAMBA2 |= {"num_key_value_heads": 4}
IDEFICS2 = {"text_config": {"model_type": "mistral", **SIZES}, "vision_config": {**VISION, "num_hidden_layers": 1}}
IDEFICS2["perceiver_config"] = {"hidden_size": 32, "resampler_depth": 1, "resampler_n_heads": 4}
IDEFICS2["perceiver_config"] |= {"resampler_head_dim": 8, "num_key_value_heads": 2}
NO_BEGIN = {name: size for name, size in SIZES.items() if name != "bos_token_id"}
QWEN3_VL = {"text_config": NO_BEGIN, "vision_config": {"depth": 1, "num_heads": 4, "out_hidden_size": 32}}
QWEN3_VL["vision_config"] |= {**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 4}
MLLAMA = {"text_config": {**SIZES, "cross_attention_layers": [1]}, "vision_config": CROSSED}


def text(model: Any, rows: int = 2) -> dict[str, torch.Tensor]:
    """Return a batch of token ids, each its own label."""
    ids = torch.randint(3, VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def classes(model: Any, rows: int = 2) -> dict[str, torch.Tensor]:
    """Return a batch of token ids with a class for each row."""
    return {**text(model, rows), "labels": torch.arange(rows) % 2}


def pictures(model: Any, rows: int = 2) -> dict[str, torch.Tensor]:
    """Return a batch of pictures with a class for each."""
    pixels = torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.arange(rows) % 2}


@dataclass(frozen=True)
class Case:
    """An architecture: what it is an example of, its transformers type, settings and class, and what it is fed."""

    name: str
    example_of: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    batch: Callable[..., dict[str, torch.Tensor]] = text
    sizes: bool = True

    @property
    def task(self) -> str | None:
        """PEFT's name of the task, where it has one."""
        tasks = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM"}
        return tasks.get(self.auto, "SEQ_CLS" if "SequenceClassification" in self.auto else None)

    @property
    def writes(self) -> bool:
        """Whether text can be sampled from the model."""
        return self.auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText")

    @property
    def has_experts(self) -> bool:
        return "expert" in self.example_of

    def make(self, dtype: torch.dtype = torch.float32) -> Any:
        """Make the model, the same every time, in evaluation mode."""
        settings = {**(SIZES if self.sizes else {}), **self.settings}
        if self.kind == "falcon":
            del settings["head_dim"]  # it derives its own
        config = AutoConfig.for_model(self.kind, **settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, self.auto).from_config(config)
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "norm" not in name:  # some are left as they were allocated
                    torch.nn.init.normal_(parameter, std=0.1)
        return model.to(dtype).eval()


CASES = [
    Case("Llama", "separate projections", "llama"),
    Case("Qwen2", "separate projections", "qwen2"),
    Case("Qwen3", "separate projections", "qwen3"),
    Case("Gemma", "tied embeddings", "gemma"),
    Case("OLMo 2", "separate projections", "olmo2"),
    Case("StableLM", "separate projections", "stablelm"),
    Case("Phi-2", "parallel blocks", "phi"),
    Case("OPT", "separate projections", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Case("StarCoder2", "separate projections", "starcoder2"),
    Case("GPT-J", "parallel blocks", "gptj", {**GPT, "rotary_dim": 4}),
    Case("GPT-Neo", "local attention", "gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": ALTERNATING}),
    Case("CodeGen", "interleaved qkv", "codegen", {**GPT, "rotary_dim": 4}),
    Case("Phi-3", "fused gate and up", "phi3"),
    Case("GLM-4", "fused gate and up", "glm"),
    Case("GPT-NeoX", "interleaved qkv", "gpt_neox"),
    Case("BLOOM", "interleaved qkv", "bloom", {"n_layer": 2, "n_head": 4}),
    Case("Falcon", "interleaved qkv, additions in place", "falcon"),
    Case("MPT", "fused qkv", "mpt", MPT),
    Case("GPT-2", "Conv1D", "gpt2", GPT),
    Case("GPT-BigCode", "multi-query attention", "gpt_bigcode", GPT),
    Case("CTRL", "embeddings scaled in place", "ctrl", CTRL),
    Case("Mistral", "sliding window", "mistral", {"sliding_window": 4}),
    Case("Gemma 2", "sliding window", "gemma2", {"sliding_window": 4}),
    Case("Gemma 3", "sliding window", "gemma3_text", {"sliding_window": 4}),
    Case("Mixtral", "experts", "mixtral", {"num_local_experts": 4}),
    Case("Qwen2-MoE", "experts and a shared one", "qwen2_moe", QWEN_MOE),
    Case("Qwen3-MoE", "experts", "qwen3_moe", {**EXPERTS, "num_experts": 4}),
    Case("GPT-OSS", "transposed experts with biases", "gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Case("DeepSeek-V3", "experts, latent attention", "deepseek_v3", {**EXPERTS, **DEEPSEEK, **LATENT}),
    Case("Nemotron-H", "hybrid, experts without gates", "nemotron_h", {**EXPERTS, **NEMOTRON}),
    Case("Mamba", "state space", "mamba", {"state_size": 4}),
    Case("RecurrentGemma", "recurrent and attention blocks", "recurrent_gemma", RECURRENT),
    Case("LFM2", "convolutions and attention", "lfm2", LFM2),
    Case("Qwen3-Next", "linear attention, experts", "qwen3_next", {**QWEN_MOE, **LINEAR, **NEXT}),
    Case("Zamba2", "state space, tied blocks with adapters of their own", "zamba2", ZAMBA2),
    Case("T5", "encoder-decoder", "t5", T5, "AutoModelForSeq2SeqLM"),
    Case("BART", "encoder-decoder", "bart", BART, "AutoModelForSeq2SeqLM"),
    Case("BERT", "encoder", "bert", auto="AutoModelForMaskedLM"),
    Case("RoBERTa", "encoder", "roberta", {"max_position_embeddings": 66}, "AutoModelForMaskedLM"),
    Case("DeBERTa-v2", "encoder", "deberta-v2", auto="AutoModelForMaskedLM"),
    Case("ModernBERT", "fused gate and up", "modernbert", {"global_attn_every_n_layers": 1}, "AutoModelForMaskedLM"),
    Case("DistilBERT", "encoder", "distilbert", DISTIL, "AutoModelForMaskedLM"),
    Case("Llama classifier", "classifier", "llama", auto="AutoModelForSequenceClassification", batch=classes),
    Case("BERT classifier", "classifier", "bert", auto="AutoModelForSequenceClassification", batch=classes),
    Case("ViT", "vision", "vit", {"image_size": 16, "patch_size": 8}, "AutoModelForImageClassification", pictures),
    Case("Gemma 3 multimodal", "multimodal wrapper", "gemma3", GEMMA_3, "AutoModelForImageTextToText", sizes=False),
    Case("Llama 3.2 Vision", "cross-attention", "mllama", MLLAMA, "AutoModelForImageTextToText", sizes=False),
    Case("Idefics2", "multimodal, perceiver", "idefics2", IDEFICS2, "AutoModelForImageTextToText", sizes=False),
    Case("Qwen3-VL", "multimodal, no begin token", "qwen3_vl", QWEN3_VL, "AutoModelForImageTextToText", sizes=False),
    Case("LLaVA", "multimodal wrapper", "llava", LLAVA, "AutoModelForImageTextToText", sizes=False),
]
# Models of which something is refused, or left out: tests/models/test_peculiar.py.
XLNET = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "pad_token_id": 0}
NLLB = {**BART, "num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
JETMOE = {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
LXMERT = {"l_layers": 1, "x_layers": 1, "r_layers": 1}
INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
MOBILEVIT = {"image_size": 16, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8] * 7}
CLASSIFIER = "AutoModelForSequenceClassification"
PECULIAR = [
    Case("Longformer", "positions before rows", "longformer", {"attention_window": 4}, "AutoModelForMaskedLM"),
    Case("XLNet", "positions before rows", "xlnet", XLNET, sizes=False),
    Case("NLLB-MoE", "a router with a classifier", "nllb-moe", NLLB, "AutoModelForSeq2SeqLM"),
    Case("HunYuan-MoE", "a router with a layer", "hunyuan_v1_moe", {"num_experts": 4, "moe_topk": [2, 2]}),
    Case("JetMoE", "experts of its own", "jetmoe", JETMOE),
    Case("LXMERT", "attention that ends in `output`", "lxmert", LXMERT, "AutoModelForPreTraining"),
    Case("DeepSeek-V3.2", "an indexer of tokens", "deepseek_v32", {**EXPERTS, **DEEPSEEK, **LATENT, **INDEXER}),
    Case("RoBERTa classifier", "a head of layers", "roberta", {"max_position_embeddings": 66}, CLASSIFIER, classes),
    Case("MobileViT", "no embeddings", "mobilevit", MOBILEVIT, "AutoModelForImageClassification", pictures),
    Case("RWKV", "tensors changed in place", "rwkv", {"attention_hidden_size": 32, "context_length": 64}),
]
CASE = {case.name: case for case in [*CASES, *PECULIAR]}


def described(case: Case) -> dict[str, Any]:
    """Return a case's row of docs/models.md: what it is, and the modules of both presets."""
    from hiplora.errors import ConfigError
    from hiplora.tuner import default_targets

    model = case.make()
    row: dict[str, Any] = {"name": case.name, "example_of": case.example_of, "class": type(model).__name__}
    row["refused"] = {} if case.writes else {"self_calibration": "own data"}
    if case.has_experts:
        row["refused"] |= {"mixed_batch": "no"}
    for preset in ("function-aware", "paper"):
        try:
            names = default_targets(model, preset)
            row[preset] = sorted({name.rpartition(".")[2] if re.search(r"\d\.", name) else name for name in names})
        except ConfigError:
            row[preset] = []
    return row
