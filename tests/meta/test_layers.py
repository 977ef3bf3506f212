"""Law 8: the house's layers."""

LAYERS = [
    {
        "errors",
        "units",
        "sizes",
        "records",
        "rng",
        "signals",
        "atomic",
        "checkpoint_files",
        "launch",
        "run_lock",
    },
    {
        "strict_yaml",
        "recipe",
        "recipe_norms",
        "recipe_sections",
        "recipe_words",
        "recipe_file",
        "recipe_new",
        "recipe_schema",
        "resolve",
        "synthetic_recipe",
        "models.names",
        "shapes",
    },
    {
        "runtime",
        "parallel",
        "norm.accounts",
        "norm.feedback",
        "norm.functional",
        "norm.probe",
        "norm.replay",
        "norm.update",
        "norm.standardize",
        "norm.batchless",
        "norm.batchless_channel",
        "norm.batchnorm_state",
        "norm.dropout",
        "norm.loop_checks",
        "norm.replace",
        "norm.channel",
        "norm.compiled",
        "norm.constants",
        "norm.dry",
        "norm.epilogue",
        "norm.fused_function",
        "norm.fused",
        "norm.foldable",
        "norm.fuse",
        "norm.fuse_check",
        "norm.fuse_forward",
        "norm.fuse_graph",
        "norm.side_effects",
        "norm.trace",
        "norm.triton_groups",
        "norm.triton_kernels",
        "norm.triton_launch",
        "norm.merge",
        "norm.convert",
        "norm.convert_state",
        "norm.convolution",
        "norm.calibrate",
        "norm.layout",
        "norm.likelihood",
        "norm.statistics",
        "norm.moments",
        "norm.strata",
        "norm",
    },
    {
        "data",
        "image_folder",
        "augment",
        "models.layers",
        "models.cifar_resnet",
        "models.paper_cnn",
        "models.build",
        "models.trained",
        "models.zoo",
        "models",
        "optim",
        "memory.allocator",
        "memory.peak",
        "memory.snapshot",
        "memory.timeline",
        "memory.tracker",
        "memory.trace",
        "memory",
    },
    {
        "train.micro_step",
        "train.step",
        "train.graph",
        "train.recovery",
        "train.diagnose",
        "train.check_state",
        "train.health",
        "train.trainer",
        "train.checkpoint",
        "train.evaluate",
        "train",
    },
    {"build", "build_data", "build_statistics", "synthetic"},
    {
        "run",
        "doctor",
        "migrate",
        "export",
        "export_formats",
        "compare",
        "memory.planner",
        "micro_batch",
        "memory.predict",
        "memory.sweep",
        "report.board",
        "report.runlog",
        "report.plots",
        "report.error_plots",
        "report.blocks",
        "report.document",
        "report.groups",
        "report.html",
        "report.markdown",
        "report.memory_section",
        "report.sections",
        "report.source",
        "report.charts",
        "report.palette",
        "report.sheet",
        "report.svg",
        "report.verdict",
        "report",
        "run_synthetic",
    },
    {"console", "console_live", "console_progress", "console_tables", "console_plan", "console_synthetic"},
    {"cli_complete", "cli_options", "cli_recipes", "cli_doctor", "cli_report"},
    {"cli_memory"},
    {"cli", "__main__", "__init__"},  # the package's own names, imported when they are used
]


def test_law_8_layering():
    """Law 8: every module has its layer, and imports no higher one."""
    import ast
    from pathlib import Path

    import bln_train

    root = Path(bln_train.__file__).parent
    layer_of = {module: n for n, modules in enumerate(LAYERS) for module in modules}
    for path in root.rglob("*.py"):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        assert name in layer_of, f"{name} has no layer in this test"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "bln_train":
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bln_train."):
                targets = [node.module.removeprefix("bln_train.")]
            else:
                targets = []
                assert not (isinstance(node, ast.Import) and any(a.name.startswith("bln_train") for a in node.names)), (
                    name
                )
            for target in targets:
                assert layer_of[target] <= layer_of[name], f"{name} imports {target} of a higher layer"
