"""What compatibility.md says: a section an aspect; a feature, its status and the tests that prove it.

"file::test" stands for all cases of a test of tests/**/file.py, "file::test[case]" for those whose name has that part.
"""

from typing import NamedTuple

YES, FALLS_BACK, NO = "yes", "falls back", "no"


class Row(NamedTuple):
    feature: str
    status: str
    tests: tuple[str, ...]
    note: str = ""


def row(feature: str, status: str, *tests: str, note: str = "") -> Row:
    return Row(feature, status, tests, note)


CONV, NORM, LINEAR, RELU = "test_conv2d", "test_batch_norm2d", "test_linear", "test_relu"
MAX, AVG, SUITES, OPERATORS = "test_max_pool2d", "test_avg_pool2d", "test_pytorch_suites", "test_operators"
SWAP, ECOSYSTEM, TRAINING, NETWORKS = "test_swap", "test_ecosystem", "test_training", "test_networks"
LARGE, PRECISION, FORMS = "test_large_tensors", "test_precision", "test_conv2d_forms"
COMPILERS, MODES, LATENCY = "test_compilers", "test_modes", "test_latency"

SECTIONS: dict[str, list[Row]] = {
    "Conv2d": [
        row("`kernel_size`, `stride`, `padding`, `dilation`", YES, f"{CONV}::test_arguments"),
        row(
            '`padding` "same", even kernels included, and "valid"',
            YES,
            f"{CONV}::test_arguments[same]",
            f"{CONV}::test_arguments[same, even kernel]",
            f"{CONV}::test_arguments[valid]",
        ),
        row(
            "`padding_mode` reflect, replicate, circular",
            YES,
            f"{CONV}::test_arguments[reflect]",
            f"{CONV}::test_arguments[replicate]",
            f"{CONV}::test_arguments[circular, same]",
        ),
        row(
            "`groups`",
            YES,
            f"{CONV}::test_arguments[groups]",
            f"{CONV}::test_arguments[small groups]",
            f"{CONV}::test_arguments[depthwise]",
            f"{CONV}::test_arguments[depthwise, two filters a channel]",
        ),
        row("`bias=False`", YES, f"{CONV}::test_arguments[no bias]"),
        row("`device`, `dtype`", YES, f"{SUITES}::test_module_samples[Conv2d]"),
        row("no batch dimension, empty batch", YES, f"{CONV}::test_arguments[unbatched]", f"{CONV}::test_empty_batch"),
        row(
            "channels_last input or weight, any strides",
            YES,
            f"{CONV}::test_arguments[channels_last]",
            f"{CONV}::test_any_strides",
            f"{CONV}::test_channels_last_weight_gives_channels_last_output",
        ),
        row("float16, bfloat16, float32, float64", YES, f"{CONV}::test_types"),
        row("complex", FALLS_BACK, f"{MODES}::test_other_tensors_fall_back[complex, conv2d]"),
        row("padding times an infinite weight is NaN", YES, f"{CONV}::test_padding_meets_infinite_weight"),
        row(
            "errors",
            YES,
            f"{CONV}::test_errors_are_pytorchs",
            f"{SUITES}::test_function_error_inputs[nn.functional.conv2d]",
        ),
        row(
            "PyTorch's own samples",
            YES,
            f"{SUITES}::test_module_samples[Conv2d]",
            f"{SUITES}::test_function_samples[nn.functional.conv2d]",
        ),
    ],
    "BatchNorm2d": [
        row(
            "`eps`, `momentum`, `momentum=None`",
            YES,
            f"{NORM}::test_arguments[eps]",
            f"{NORM}::test_arguments[momentum]",
            f"{NORM}::test_arguments[cumulative]",
        ),
        row("`affine=False`", YES, f"{NORM}::test_arguments[not affine]"),
        row("`track_running_stats=False`", YES, f"{NORM}::test_arguments[no running statistics]"),
        row("running statistics over several batches", YES, f"{NORM}::test_running_statistics_over_several_batches"),
        row(
            "old checkpoints without `num_batches_tracked`",
            YES,
            f"{ECOSYSTEM}::test_an_old_checkpoint_without_num_batches_tracked",
        ),
        row("empty batch", YES, f"{NORM}::test_empty_batch"),
        row("channels_last, any strides", YES, f"{NORM}::test_arguments[channels_last]", f"{NORM}::test_any_strides"),
        row("parameters and statistics with gaps", YES, f"{NORM}::test_parameters_and_statistics_may_be_views"),
        row("float16, bfloat16, float32, float64", YES, f"{NORM}::test_types"),
        row("half input with float32 parameters", YES, f"{NORM}::test_half_input_with_float32_parameters"),
        row(
            "integers: PyTorch's error",
            YES,
            f"{MODES}::test_integers_fall_back_or_are_pytorchs_error[batch_norm2d]",
        ),
        row("a large mean loses no digits", YES, f"{NORM}::test_large_mean_loses_no_digits"),
        row(
            "errors",
            YES,
            f"{NORM}::test_errors_are_pytorchs",
        ),
        row(
            "PyTorch's own samples",
            YES,
            f"{SUITES}::test_module_samples[BatchNorm2d]",
            f"{SUITES}::test_function_samples[nn.functional.batch_norm]",
        ),
    ],
    "Linear": [
        row("`bias=False`", YES, f"{LINEAR}::test_types[no bias]"),
        row("any leading dimensions, none, empty", YES, f"{LINEAR}::test_leading_dimensions"),
        row("any sizes, no input features", YES, f"{LINEAR}::test_sizes"),
        row("any strides", YES, f"{LINEAR}::test_any_strides"),
        row("float16, bfloat16, float32, float64", YES, f"{LINEAR}::test_types"),
        row("complex", FALLS_BACK, f"{MODES}::test_other_tensors_fall_back[complex, linear]"),
        row(
            "errors",
            YES,
            f"{LINEAR}::test_error_is_pytorchs",
        ),
        row(
            "PyTorch's own samples",
            YES,
            f"{SUITES}::test_module_samples[Linear]",
            f"{SUITES}::test_function_samples[nn.functional.linear]",
        ),
    ],
    "MaxPool2d": [
        row("`kernel_size`, `stride`, `padding`, `dilation`", YES, f"{MAX}::test_arguments_and_indices"),
        row(
            "`ceil_mode`",
            YES,
            f"{MAX}::test_arguments_and_indices[ceil_mode]",
            f"{MAX}::test_arguments_and_indices[ceil_mode, last window dropped]",
        ),
        row("`return_indices`", YES, f"{MAX}::test_arguments_and_indices", f"{MAX}::test_which_of_a_window_wins"),
        row(
            "no batch dimension, empty batch",
            YES,
            f"{MAX}::test_arguments_and_indices[unbatched]",
            f"{MAX}::test_arguments_and_indices[empty batch]",
        ),
        row(
            "channels_last, any strides",
            YES,
            f"{MAX}::test_arguments_and_indices[channels_last]",
            f"{MAX}::test_any_strides",
        ),
        row("float16, bfloat16, float32, float64", YES, f"{MAX}::test_types"),
        row(
            "integers",
            FALLS_BACK,
            f"{MODES}::test_integers_fall_back_or_are_pytorchs_error[max_pool2d]",
            note="on a GPU PyTorch's error",
        ),
        row("ties, NaN, infinities", YES, f"{MAX}::test_which_of_a_window_wins"),
        row(
            "errors",
            YES,
            f"{MAX}::test_errors_are_pytorchs",
            f"{SUITES}::test_function_error_inputs[nn.functional.max_pool2d]",
        ),
        row(
            "PyTorch's own samples",
            YES,
            f"{SUITES}::test_module_samples[MaxPool2d]",
            f"{SUITES}::test_function_samples[nn.functional.max_pool2d]",
        ),
    ],
    "AvgPool2d, AdaptiveAvgPool2d": [
        row("`kernel_size`, `stride`, `padding`", YES, f"{AVG}::test_arguments"),
        row(
            "`ceil_mode`",
            YES,
            f"{AVG}::test_arguments[ceil_mode]",
            f"{AVG}::test_arguments[ceil_mode, last window dropped]",
        ),
        row(
            "`count_include_pad=False`",
            YES,
            f"{AVG}::test_arguments[padding not counted]",
            f"{AVG}::test_arguments[ceil_mode, padding not counted]",
        ),
        row("`divisor_override`", YES, f"{AVG}::test_arguments[divisor]"),
        row("`output_size` (adaptive): numbers, `None`", YES, f"{AVG}::test_adaptive"),
        row(
            "no batch dimension, empty batch",
            YES,
            f"{AVG}::test_arguments[unbatched]",
            f"{AVG}::test_arguments[empty batch]",
            f"{AVG}::test_adaptive[unbatched]",
            f"{AVG}::test_adaptive[empty batch]",
        ),
        row("channels_last, any strides", YES, f"{AVG}::test_arguments[channels_last]", f"{AVG}::test_any_strides"),
        row(
            "float16, bfloat16, float32, float64",
            YES,
            f"{AVG}::test_types",
            f"{AVG}::test_float16_sums_do_not_overflow",
        ),
        row(
            "integers",
            FALLS_BACK,
            f"{MODES}::test_integers_fall_back_or_are_pytorchs_error[avg_pool2d]",
            f"{MODES}::test_integers_fall_back_or_are_pytorchs_error[adaptive_avg_pool2d]",
            note="where PyTorch has it, otherwise its error",
        ),
        row("NaN and infinity stay in their windows", YES, f"{AVG}::test_nan_and_infinity_stay_in_their_windows"),
        row(
            "errors",
            YES,
            f"{AVG}::test_errors_are_pytorchs",
            f"{SUITES}::test_function_error_inputs[nn.functional.avg_pool2d]",
        ),
        row(
            "PyTorch's own samples",
            YES,
            f"{SUITES}::test_module_samples[AvgPool2d]",
            f"{SUITES}::test_module_samples[AdaptiveAvgPool2d]",
            f"{SUITES}::test_function_samples[nn.functional.avg_pool2d]",
            f"{SUITES}::test_function_samples[nn.functional.adaptive_avg_pool2d]",
        ),
    ],
    "ReLU": [
        row(
            "`inplace`", YES, f"{RELU}::test_inplace", f"{RELU}::test_inplace_gradient", f"{RELU}::test_inplace_errors"
        ),
        row("any shape and strides", YES, f"{RELU}::test_any_shape_and_strides"),
        row("float16, bfloat16, float32, float64", YES, f"{RELU}::test_types"),
        row("integers", YES, f"{RELU}::test_integers"),
        row(
            "NaN, infinities, denormals",
            YES,
            f"{RELU}::test_nan_infinity_and_zeros_of_both_signs",
            f"{RELU}::test_denormals",
        ),
        row("a result saved for backward is protected", YES, f"{RELU}::test_saved_tensor_is_protected_from_inplace"),
        row("errors: bool, complex", YES, f"{RELU}::test_errors_are_pytorchs"),
        row(
            "PyTorch's own samples",
            YES,
            f"{SUITES}::test_module_samples[ReLU]",
            f"{SUITES}::test_function_samples[nn.functional.relu]",
        ),
    ],
    "Large tensors": [
        row(
            "more than 2^31 elements in and out",
            YES,
            f"{LARGE}::test_batch_of_more_than_int32_elements",
            f"{LARGE}::test_image_of_more_than_int32_pixels",
            f"{LARGE}::test_linear_of_more_than_int32_elements",
        ),
        row(
            "offsets beyond 2^31 by stride or storage alone",
            YES,
            f"{LARGE}::test_strides_past_int32",
            f"{LARGE}::test_storage_offset_past_int32",
        ),
        row("more than 65,535 images, rows, columns, channels", YES, f"{LARGE}::test_more_than_65535"),
    ],
    "Precision": [
        row("no larger an error than PyTorch's", YES, f"{PRECISION}::test_no_less_precise_than_pytorch"),
        row("every form of the convolution, every image", YES, f"{FORMS}::test_every_image"),
        row("the same bits every time", YES, f"{FORMS}::test_every_image"),
        row(
            "infinity, NaN and huge operands in strict float32",
            YES,
            f"{PRECISION}::test_strict_float32_keeps_special_values",
            f"{PRECISION}::test_strict_float32_sums_of_infinities",
        ),
        row(
            "TF32 rounds to nearest, without a bias",
            YES,
            f"{PRECISION}::test_tf32_rounds_to_nearest",
            f"{PRECISION}::test_tf32_is_unbiased",
        ),
    ],
    "Swapping": [
        row(
            "every layer of the six kinds; one kind; several",
            YES,
            f"{SWAP}::test_all_kinds",
            f"{SWAP}::test_one_kind",
            f"{SWAP}::test_several_kinds_one_after_the_other",
        ),
        row(
            "nothing is left behind after `restore`",
            YES,
            f"{SWAP}::test_restore_leaves_nothing_behind",
            f"{SWAP}::test_swapped_restores_on_exit_and_on_error",
        ),
        row("the model itself, shared modules", YES, f"{SWAP}::test_the_model_itself_and_a_shared_module"),
        row(
            "a subclass of a torch.nn class",
            NO,
            f"{SWAP}::test_subclass_stays_and_the_report_says_why",
            note="stays PyTorch, and the report says why",
        ),
        row(
            "torchvision's classification networks, a member of each family",
            YES,
            f"{NETWORKS}::test_torchvision_network",
            note="[coverage](coverage.md)",
        ),
        row("three of them on 32x32 images", YES, f"{NETWORKS}::test_torchvision_network_in_small"),
        row(
            "fallbacks are counted; `strict=True` makes them errors",
            YES,
            f"{SWAP}::test_fallbacks_are_reported",
            f"{CONV}::test_type_without_a_kernel_falls_back_and_is_counted",
        ),
    ],
    "Checkpoints, copies, changes of a layer": [
        row("`state_dict` both ways, strict", YES, f"{ECOSYSTEM}::test_state_dict_both_ways"),
        row("`deepcopy`, `pickle`", YES, f"{SWAP}::test_copies_of_a_swapped_model"),
        row("`torch.save(model)`, `weights_only` loading included", YES, f"{ECOSYSTEM}::test_torch_save_of_the_model"),
        row("`torch.nn.utils.parametrize` after the swap", YES, f"{ECOSYSTEM}::test_parametrize_a_swapped_layer"),
        row(
            "`torch.nn.utils.parametrize` before the swap",
            NO,
            f"{ECOSYSTEM}::test_a_parametrized_layer_stays_and_the_report_says_why",
            note="a subclass: stays PyTorch, and the report says why",
        ),
        row("weight and spectral norm", YES, f"{ECOSYSTEM}::test_weight_norms"),
        row("pruning", YES, f"{ECOSYSTEM}::test_pruning"),
        row("`fuse_conv_bn_eval`", YES, f"{ECOSYSTEM}::test_fuse_conv_bn_eval"),
        row(
            "`convert_sync_batchnorm`",
            NO,
            f"{ECOSYSTEM}::test_convert_sync_batchnorm_before_and_after_the_swap",
            note="SyncBatchNorm stays PyTorch, and the report says so",
        ),
        row(
            "hooks: forward, backward, on tensors",
            YES,
            f"{ECOSYSTEM}::test_forward_hooks",
            f"{ECOSYSTEM}::test_backward_hooks",
            f"{ECOSYSTEM}::test_in_place_relu_under_a_full_backward_hook_is_pytorchs_error",
        ),
    ],
    "Gradients and training": [
        row(
            "gradients of every layer against float64",
            YES,
            f"{OPERATORS}::test_gradients_to_the_second_order",
            f"{TRAINING}::test_gradients_of_what_needs_one",
        ),
        row(
            "double backward",
            YES,
            f"{OPERATORS}::test_gradients_to_the_second_order",
            f"{TRAINING}::test_gradient_penalty",
        ),
        row(
            "gradients by Triton's kernels, none by PyTorch's",
            YES,
            "test_backward::test_a_swapped_network_runs_none_of_pytorchs_gradients",
            "test_backward::test_compiled_gradients",
        ),
        row("networks fused for training", YES, "test_fuse_for_training::test_trains_like_pytorch"),
        row("frozen parameters, accumulation", YES, f"{TRAINING}::test_gradients_of_what_needs_one"),
        row("activation checkpointing", YES, f"{TRAINING}::test_checkpointed_activations"),
        row(
            "a tiny network trains to float64's rounding", YES, f"{TRAINING}::test_tiny_network_trains_to_the_rounding"
        ),
        row("ResNet18 trains like PyTorch's, 100 steps", YES, f"{TRAINING}::test_resnet18_trains_like_pytorch"),
    ],
    "Compilers and tracers": [
        row("`torch.compile(fullgraph=True)`", YES, f"{OPERATORS}::test_compiles_without_graph_breaks"),
        row("the same with inductor", YES, f"{COMPILERS}::test_inductor_compiles_without_graph_breaks"),
        row("compiled is no slower than eager", YES, f"{LATENCY}::test_compiled_is_no_slower_than_eager"),
        row(
            "a fallback inside compiled code",
            YES,
            f"{COMPILERS}::test_a_fallback_compiles_without_graph_breaks_and_is_reported",
            note="counted once",
        ),
        row(
            "`torch.export`, any batch size",
            YES,
            f"{OPERATORS}::test_exports",
            f"{COMPILERS}::test_exports_with_any_batch",
        ),
        row("`make_fx`, FakeTensor", YES, f"{COMPILERS}::test_make_fx"),
        row("meta tensors", YES, f"{COMPILERS}::test_meta_tensors"),
        row(
            "`torch.fx.symbolic_trace`",
            YES,
            f"{COMPILERS}::test_symbolic_trace_keeps_the_layers_as_nodes",
            note="of swapped layers; layers built as Triton layers need a Tracer whose leaves they are",
        ),
        row("torchvision's `create_feature_extractor`", YES, f"{COMPILERS}::test_feature_extractor_of_torchvision"),
        row("`FlopCounterMode`", YES, f"{COMPILERS}::test_flop_counter"),
        row("`torch.jit.trace`", YES, f"{COMPILERS}::test_jit_trace"),
        row("`torch.jit.script`", NO, f"{COMPILERS}::test_jit_script_needs_pytorchs_layers", note="restore first"),
        row("`torch.library.opcheck` of every operator", YES, f"{OPERATORS}::test_opcheck"),
    ],
    "torch.func and forward mode": [
        row("`functional_call`", YES, f"{COMPILERS}::test_functional_call"),
        row("`grad`, `vjp`, `jacrev`, and of each other", YES, f"{COMPILERS}::test_transforms"),
        row(
            "`vmap`",
            YES,
            f"{OPERATORS}::test_vmap",
            f"{COMPILERS}::test_transforms[vmap]",
            f"{COMPILERS}::test_transforms[vmap of another dimension]",
            note="one launch an example",
        ),
        row("gradients of every example", YES, f"{COMPILERS}::test_transforms[gradients of every example]"),
        row(
            "ensembles by `stack_module_state`, training included",
            YES,
            f"{COMPILERS}::test_an_ensemble_under_vmap",
            f"{COMPILERS}::test_running_statistics_of_a_vmapped_batch_are_pytorchs_error",
        ),
        row(
            "`jvp`, `jacfwd`, `hessian`, dual numbers",
            FALLS_BACK,
            f"{COMPILERS}::test_forward_mode_falls_back",
            f"{COMPILERS}::test_dual_numbers_fall_back",
        ),
        row(
            "`torch.func` inside `torch.compile`",
            FALLS_BACK,
            f"{COMPILERS}::test_transforms_inside_compiled_code_fall_back",
        ),
    ],
    "Autocast, modes, tensors": [
        row("autocast's type rules, float16 and bfloat16", YES, f"{MODES}::test_autocast_has_pytorchs_type_rules"),
        row(
            "training under autocast with a gradient scaler",
            YES,
            f"{MODES}::test_autocast_trains_with_a_gradient_scaler",
        ),
        row(
            "`no_grad`, `inference_mode`",
            YES,
            f"{MODES}::test_modes_of_autograd",
            f"{MODES}::test_a_network_made_in_inference_mode",
        ),
        row(
            "`use_deterministic_algorithms`",
            YES,
            f"{MODES}::test_deterministic_algorithms_give_the_same_bits_twice",
        ),
        row("subclasses of Tensor", YES, f"{MODES}::test_subclasses_of_tensor"),
        row(
            "nested and sparse tensors",
            FALLS_BACK,
            f"{MODES}::test_other_tensors_fall_back[nested]",
            f"{MODES}::test_other_tensors_fall_back[nested, jagged]",
            f"{MODES}::test_other_tensors_fall_back[sparse]",
        ),
        row("DTensor", FALLS_BACK, f"{MODES}::test_distributed_tensors_fall_back"),
    ],
    "Threads, processes, devices": [
        row("several threads at once", YES, f"{MODES}::test_two_threads_at_once"),
        row("a forked data-loader worker", YES, f"{MODES}::test_a_forked_data_loader_worker"),
        row(
            "CUDA graph of a warmed network, of a training step",
            YES,
            f"{MODES}::test_cuda_graph_of_a_warmed_network",
            f"{MODES}::test_cuda_graph_of_a_training_step",
        ),
        row("a side stream", YES, f"{MODES}::test_side_stream"),
        row("a second GPU while the first is current", YES, f"{MODES}::test_a_second_gpu_while_the_first_is_current"),
        row("`DataParallel`", YES, f"{MODES}::test_data_parallel"),
        row(
            "CPU tensors without Triton's interpreter",
            NO,
            f"{SWAP}::test_cpu_tensor_without_the_interpreter_is_a_clear_error",
            note="a clear error",
        ),
    ],
}
