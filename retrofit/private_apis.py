"""What we lean on in other packages without a promise that it stays: names that are private or not documented.

Data only; nothing imports it but a test, which names what vanished from the versions installed, and finds private names
in our code that are not listed here.  What one of them vanishing means is in `why`.  A new one is a last resort.
"""

from __future__ import annotations

from typing import NamedTuple

TRIED = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "triton": "3.7.1", "accelerate": "1.15.0"}
"""The newest version of each that the tests passed with."""


class PrivateApi(NamedTuple):
    """One name that may vanish."""

    name: str
    """Dotted: package, module, class where there is one, name."""
    why: str
    used_by: tuple[str, ...]
    """Files that use it."""


PRIVATE_APIS = (
    # torch
    PrivateApi(
        "torch.nn.Module._parameters",
        "a weight past the module machinery, a tenth of a small model's decode step; what a module holds of its own",
        (
            "retrofit/adapters/gated_lora.py",
            "retrofit/runtime/backends/hf/exact_products.py",
            "retrofit/runtime/backends/hf/linear/packing.py",
            "retrofit/runtime/backends/hf/linear/products.py",
            "retrofit/runtime/backends/hf/recorded/watch.py",
        ),
    ),
    PrivateApi(
        "torch.nn.Module._modules",
        "the adapter's layers past the module machinery, as `_parameters`; whether a module has been replaced",
        ("retrofit/adapters/gated_lora.py", "retrofit/runtime/backends/hf/recorded/watch.py"),
    ),
    PrivateApi(
        "torch.nn.Module._forward_hooks",
        "whether somebody hooked the layer, which then has to be called as a module",
        ("retrofit/adapters/gated_lora.py", "retrofit/runtime/backends/hf/recorded/watch.py"),
    ),
    PrivateApi(
        "torch.nn.modules.module._has_any_global_hook",
        "whether somebody hooked all modules, which then have to be called",
        ("retrofit/runtime/backends/hf/recorded/steps.py",),
    ),
    PrivateApi(
        "torch.nn.Module._forward_pre_hooks",
        "as `_forward_hooks`",
        (
            "retrofit/adapters/gated_lora.py",
            "retrofit/runtime/backends/hf/linear/packing.py",
            "retrofit/runtime/backends/hf/recorded/watch.py",
        ),
    ),
    PrivateApi(
        "torch.ops.mkldnn._reorder_linear_weight",
        "lays a weight out for a CPU; without it weights stay plain",
        ("retrofit/runtime/backends/hf/linear/products.py",),
    ),
    PrivateApi(
        "torch.ops.mkldnn._linear_pointwise",
        "multiplies by such a weight, as Inductor's code does",
        ("retrofit/runtime/backends/hf/linear/products.py",),
    ),
    PrivateApi(
        "torch.nn.Module._compiled_call_impl",
        "whether a module was compiled in place, which would decode with recorded code",
        ("retrofit/runtime/backends/hf/backend.py",),
    ),
    PrivateApi(
        "torch._dynamo.eval_frame._torchdynamo_orig_callable",
        "set on a function that torch.compile wrapped, which would decode with recorded code",
        ("retrofit/runtime/backends/hf/backend.py",),
    ),
    PrivateApi(
        "torch.Tensor._version",
        "how often a weight was written to: kept K/V are of no use once it was",
        ("retrofit/adapters/written.py",),
    ),
    PrivateApi(
        "torch.UntypedStorage._cdata",
        "tells two tensors of one storage from two of two: the dry run counts storages",
        ("retrofit/recipes/dry_run/rehearsal.py",),
    ),
    PrivateApi(
        "torch.utils._python_dispatch.TorchDispatchMode",
        "sees every operation of the dry run",
        ("retrofit/recipes/dry_run/rehearsal.py",),
    ),
    PrivateApi(
        "torch.utils._pytree.tree_iter",
        "the tensors in what an operation of the dry run returned",
        ("retrofit/recipes/dry_run/rehearsal.py",),
    ),
    PrivateApi(
        "torch._ops.OpOverload._schema",
        "whether an operation of the dry run works in place",
        ("retrofit/recipes/dry_run/rehearsal.py",),
    ),
    PrivateApi(
        "torch.ops.aten._local_scalar_dense",
        "reads a value, which tensors without values cannot give",
        ("retrofit/recipes/dry_run/rehearsal.py",),
    ),
    PrivateApi(
        "torch.ops.aten._to_copy",
        "moves a tensor, which in the dry run keeps it without values",
        ("retrofit/recipes/dry_run/rehearsal.py",),
    ),
    PrivateApi(
        "torch.ops.aten._unique2",
        "a size that depends on values: the dry run takes the largest",
        ("retrofit/recipes/dry_run/rehearsal.py",),
    ),
    PrivateApi(
        "torch.ops.aten._grouped_mm",
        "experts: PyTorch knows the shape of the result in bfloat16 only",
        ("retrofit/recipes/dry_run/rehearsal.py",),
    ),
    PrivateApi(
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
        "the CPU's attention kernel and the sums of its weights, else base rows attend by products; its dry run",
        ("retrofit/recipes/dry_run/rehearsal.py", "retrofit/runtime/backends/hf/parts/call.py"),
    ),
    PrivateApi(
        "torch.distributed.distributed_c10d._get_default_store",
        "where processes leave word that one has failed",
        ("retrofit/recipes/processes.py",),
    ),
    PrivateApi("torch.utils.collect_env.get_os", "`retrofit doctor`", ("retrofit/eval/doctor.py",)),
    PrivateApi("torch.utils.collect_env.get_libc_version", "`retrofit doctor`", ("retrofit/eval/doctor.py",)),
    # transformers
    PrivateApi(
        "transformers.PreTrainedConfig._experts_implementation",
        "how routed experts are computed, which decides how draft rows are kept from base rows",
        (
            "retrofit/eval/subject.py",
            "retrofit/runtime/backends/hf/backend.py",
            "retrofit/runtime/backends/hf/linear/experts.py",
        ),
    ),
    PrivateApi(
        "transformers.models.mixtral.modeling_mixtral.MixtralExperts._apply_gate",
        "what a routed expert does between its two products, which `use_experts_implementation` puts on the module",
        ("retrofit/runtime/backends/hf/linear/experts.py",),
    ),
    PrivateApi(
        "transformers.PreTrainedConfig._name_or_path",
        "the name of a live model",
        ("retrofit/recipes/training/prepare.py",),
    ),
    PrivateApi(
        "transformers.GenerationConfig._from_model_config",
        "whether a generation_config was written or derived: only one that was written may leave EOS out",
        ("retrofit/runtime/settings.py",),
    ),
    PrivateApi(
        "transformers.PreTrainedModel._is_stateful",
        "a model with a recurrent state is refused where rows do not get through all of its recurrent layers",
        ("retrofit/runtime/backends/hf/refused.py",),
    ),
    *(
        PrivateApi(
            f"transformers.models.{family}.modeling_{family}.{name}",
            "what a recurrent layer calls to look from row to row, where ours stands in; without it a model is refused",
            ("retrofit/runtime/backends/hf/recurrent/mixers.py",),
        )
        for family, name in (
            ("qwen3_next", "causal_conv1d_fn"),
            ("qwen3_next", "torch_chunk_gated_delta_rule"),
            ("bamba", "mamba2_chunk_scan"),
            ("kimi_linear", "chunk_kimi_delta_attention"),
            ("mamba", "mamba_selective_scan"),
        )
    ),
    PrivateApi(
        "transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRglru._rnn_scan",
        "the one method of an RG-LRU that looks from row to row, where ours stands in",
        ("retrofit/runtime/backends/hf/recurrent/own_layers.py",),
    ),
    PrivateApi(
        "transformers.PreTrainedModel._can_set_attn_implementation",
        "a model that does not call the attention interface is refused",
        ("retrofit/runtime/backends/hf/refused.py",),
    ),
    PrivateApi(
        "transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected",
        "tensors of a checkpoint that are none of the model's, when its weights are compared",
        ("retrofit/eval/weights.py",),
    ),
    PrivateApi(
        "transformers.PreTrainedModel._keep_in_fp32_modules",
        "weights that stay in fp32 whatever the rest runs in",
        ("retrofit/quantised/loading.py",),
    ),
    PrivateApi(
        "transformers.core_model_loading.revert_weight_conversion",
        "turns experts that were fused at load back into the tensors of the checkpoint",
        ("retrofit/eval/weights.py",),
    ),
    PrivateApi(
        "transformers.AttentionInterface._global_mapping",
        "the benchmark's plain trainer puts its own attention in the place of ours",
        ("benchmarks/naive_training.py",),
    ),
    PrivateApi(
        "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING._model_mapping",
        "every decoder there is, for the table of supported models",
        ("benchmarks/decoders.py",),
    ),
    # peft
    PrivateApi(
        "peft.LoraConfig._register_custom_module",
        "lets PEFT make gated layers; documented as experimental",
        ("retrofit/adapters/attach.py",),
    ),
    PrivateApi(
        "peft.utils.other.AuxiliaryTrainingWrapper",
        "a model with somebody else's adapter is refused",
        ("retrofit/adapters/live.py",),
    ),
    # accelerate
    PrivateApi(
        "accelerate.hooks._hf_hook",
        "set on modules that are offloaded, which are refused",
        ("retrofit/adapters/live.py",),
    ),
    # triton
    PrivateApi(
        "triton.runtime.interpreter._patch_lang",
        "the interpreter replaces `tl` anew at every call; ours does so once",
        ("retrofit/runtime/kernels/interpreter.py",),
    ),
    PrivateApi(
        "triton.runtime.interpreter.InterpreterBuilder",
        "its casts and products are made those of a GPU",
        ("retrofit/runtime/kernels/interpreter.py",),
    ),
    PrivateApi(
        "triton.runtime.interpreter.TensorHandle",
        "what its casts and products return",
        ("retrofit/runtime/kernels/interpreter.py",),
    ),
)
