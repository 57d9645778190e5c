"""A model spread over processes: which ways the trainer knows."""

from transformers import Trainer


def refuse_unsupported(trainer: Trainer) -> None:
    """Ways of spreading a model over devices that nobody has tried with this trainer."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "several GPUs are visible to one process, which Trainer would use through nn.DataParallel; start with "
            "torchrun or accelerate launch, or make one GPU visible"
        )
    for name, used in (
        ("DeepSpeed", trainer.is_deepspeed_enabled),
        ("FSDP", trainer.is_fsdp_enabled),
        ("a parallelism_config", trainer.accelerator.parallelism_config is not None),
        ("a model sharded while loading", trainer.is_distributed_loading_by_transformers),
    ):
        if used:
            raise ValueError(f"{name} is not supported yet; expected one process or plain DDP")
