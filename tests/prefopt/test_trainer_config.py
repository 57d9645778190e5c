"""Defect 10: every option is checked at once, with the nearest name; and what the trainer refuses, with the reason."""

import copy
import dataclasses
import pickle

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig

from prefopt.data import load_rows, tokenize_rows
from prefopt.options import OPTIONS, in_force
from prefopt.train import PreferenceConfig, PreferenceTrainer, TrainingWarning
from prefopt.train.methods import METHODS
from support.tiny_models import make_dataset, make_rows
from support.trainer import make_trainer, make_world, train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("qwen3", tmp_path_factory.mktemp("qwen3"))


def test_defect_10_all_wrong_options_in_one_message_with_the_nearest_name():
    with pytest.raises(ValueError) as caught:
        PreferenceConfig("run", use_cpu=True, betta=0.2, learning_rates=1.0, method="apo-zero", beta=0)
    message = str(caught.value)
    for part in (
        "4 options",
        "betta is not an option; did you mean beta?",
        "learning_rates is not an option; did you mean learning_rate?",
        "method is 'apo-zero'; expected one of kto, apo_zero, enhanced_kto, bco, dpo, ipo, cpo, simpo, orpo, sft; "
        "did you mean apo_zero?",
        "beta is 0; expected a number above 0",
    ):
        assert part in message, message


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"method": "ppo"}, "method is 'ppo'; expected one of kto, "),
        ({"kl_estimator": "batch"}, "'batch'; expected None or one of window, microbatch, ema"),
        ({"sampler": "shuffle"}, "sampler is 'shuffle'"),
        ({"on_bad_row": "drop"}, "on_bad_row is 'drop'"),
        ({"backend": "tritn"}, "did you mean triton?"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"desirable_weight": -1.0}, "desirable_weight is -1.0; expected a number at least 0"),
        ({"undesirable_weight": True}, "undesirable_weight is True"),
        ({"max_length": 1}, "max_length is 1; expected a number at least 2"),
        ({"precompute_batch_size": 0}, "precompute_batch_size is 0"),
        (
            {"kl_estimator": "microbatch", "per_device_train_batch_size": 1},
            "no other row's completion",
        ),
        ({"per_device_train_batch_size": 1}, "accumulate, or use method 'apo_zero'"),
        (
            {"precompute_ref_logps": True, "kl_estimator": "microbatch"},
            "use kl_estimator 'window' or sampler 'sequential'",
        ),
        ({"loss_aversion": 2.0}, "loss_aversion is 2.0; method 'kto' has no use for it here"),
        ({"method": "bco", "desirable_weight": 1.5}, "(it takes: beta, shift, shift_bound, "),
        ({"method": "sft", "beta": 0.1}, "method 'sft' has no use for it here (it takes: none)"),
        ({"method": "apo_zero", "kl_estimator": "window"}, "'apo_zero' has no use for it"),
        ({"kl_decay": 0.5}, "kl_decay is 0.5; method 'kto' has no use for it here"),
        ({"method": "enhanced_kto", "shift_bound": 1.0}, "shift_bound is 1.0; method 'enh"),
        ({"method": "bco", "shift": "off", "shift_start": 0.1}, "shift_start is 0.1"),
        ({"method": "bco", "shift_decay": 0.5}, "shift_decay is 0.5; method 'bco'"),
        (
            {"method": "enhanced_kto", "decision_weighting": "off", "decision_clip": (1, 2)},
            "decision_clip is (1, 2); method",
        ),
        ({"method": "bco", "shift": "windows"}, "did you mean window?"),
        ({"method": "bco", "shift_start": "soon"}, "expected a number or one of plateau or None"),
        ({"method": "enhanced_kto", "win_weighting": "prelecs"}, "did you mean prelec?"),
        ({"method": "enhanced_kto", "decision_clip": (2, 1)}, "(low, high) with 0 < low <= high"),
        ({"method": "enhanced_kto", "alpha": 1.5}, "expected a number above 0 and at most 1"),
        ({"method": "enhanced_kto", "kappa": 0}, "kappa is 0; expected a number above 0"),
        (
            {"method": "enhanced_kto", "kl_estimator": "ema", "kl_decay": 1},
            "kl_decay is 1; expected",
        ),
        ({"method": "dpo", "label_smoothing": 0.5}, "expected a number at least 0 and below 0.5"),
        ({"method": "dpo", "robust": True}, "robust is True and label_smoothing 0"),
        ({"method": "dpo", "robust": 1.5}, "robust is 1.5; expected True or False or None"),
        ({"method": "cpo", "precompute_ref_logps": True}, "'cpo' has no reference model"),
        ({"method": "dpo", "sampler": "label_balanced"}, "learns from pairs: expected random or"),
        ({"method": "sft", "sampler": "label_balanced"}, "answers of one label"),
        (
            {"method": "bco", "per_device_train_batch_size": 1},
            "never has both labels, which shift 'window' is the mean of",
        ),
        ({"train_sampling_strategy": "group_by_length"}, "it follows from sampler"),
        ({"logging_nan_inf_filter": True}, "which stops the run"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"remove_unused_columns": False}, "remove_unused_columns"),
        ({"use_liger_kernel": True}, "always fused here, without logits; backend chooses the kern"),
        ({"bf16_full_eval": True}, "rounds the policy's weights for good and not the reference's"),
        ({"auto_find_batch_size": True}, "would change the rows of each optimizer step"),
        ({"debug": "underflow_overflow"}, "it cannot read the head's output"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches True; expected Fal"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches False; expected True"),
        ({"torch_compile_mode": "reduce-overhead"}, "it replays CUDA graphs"),
        ({"torch_compile_backend": "inducter"}, "did you mean inductor?"),
        ({"metric_for_best_model": "rewards/accuracies"}, "method 'kto' logs loss, entropy, log"),
        ({"method": "dpo", "metric_for_best_model": "eval_kl"}, "'eval_kl'; method 'dpo' logs"),
        ({"metric_for_best_model": "kl"}, "greater_is_better is left out; expected True or Fal"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; expected a number at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; expected a number at least 1"),
        ({"per_device_eval_batch_size": None}, "is None; expected a whole number"),
    ],
)
def test_defect_10_a_wrong_option_is_named_with_what_is_expected(options, part):
    with pytest.raises(ValueError) as caught:
        PreferenceConfig("run", use_cpu=True, **options)
    assert part in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_defaults_that_fit_and_keeps_them_when_copied(method):
    config = PreferenceConfig("run", use_cpu=True, method=method)
    used = in_force({"method": method})
    assert {name: getattr(config, name) for name in used} == used
    assert all(getattr(config, name) is None for name in set(OPTIONS) - set(used))
    assert dataclasses.replace(config, learning_rate=1e-4).to_dict() == config.to_dict() | {"learning_rate": 1e-4}


def test_defaults_follow_from_the_options_that_are_given():
    config = PreferenceConfig("run", use_cpu=True, method="enhanced_kto", beta=0.4, shift="ema")
    assert (config.main_bound, config.odds_bound) == (0.1, 0.2)
    assert (config.shift_bound, config.shift_start, config.shift_ramp) == (0.5, 0.3, 0.1)
    assert config.shift_decay == 0.9 and config.needs_window
    off = {"decision_weighting": "off", "shift": "off"}
    config = PreferenceConfig("run", use_cpu=True, method="enhanced_kto", **off)
    assert not config.needs_window and config.main_bound == 0 and config.decision_clip is None
    assert PreferenceConfig("run", use_cpu=True, method="sft").sampler == "random"


def test_batch_size_one_is_no_problem_without_a_reference_point():
    config = PreferenceConfig("run", use_cpu=True, method="apo_zero", per_device_train_batch_size=1)
    assert not config.needs_kl


def test_a_config_survives_copies_and_options_changed_later_are_checked(world, tmp_path):
    config = PreferenceConfig(str(tmp_path), use_cpu=True, beta=0.3, sampler="sequential")
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied.to_dict() == config.to_dict()
    assert dataclasses.replace(config, beta=0.4).beta == 0.4
    assert config.train_sampling_strategy == "sequential"
    config.beta = -1.0
    with pytest.raises(ValueError, match="beta is -1.0"):
        PreferenceTrainer(world.model, config, make_dataset(True), None, world.tokenizer)


def test_a_trainer_names_the_argument_that_does_not_fit(world, tmp_path):
    def refuse(error: type, match: str, **options):
        with pytest.raises(error, match=match):
            make_trainer(world, tmp_path, **options)

    refuse(TypeError, "model is a str; expected a PreTrainedModel", model="some/model")
    refuse(TypeError, "peft_config is a dict", peft_config={"r": 4})
    frozen = copy.deepcopy(world.model).requires_grad_(False)
    refuse(ValueError, "nothing to train", model=frozen)
    wrapped = get_peft_model(copy.deepcopy(world.model), LoraConfig(target_modules=["q_proj"]))
    refuse(ValueError, "expected one of the two", model=wrapped, peft_config=LoraConfig())
    with pytest.raises(TypeError, match="args is a NoneType; expected a PreferenceConfig"):
        PreferenceTrainer(world.model, None, make_dataset(True))
    config = PreferenceConfig(str(tmp_path), use_cpu=True, max_length=96)
    with pytest.raises(TypeError, match="train_dataset is None"):
        PreferenceTrainer(world.model, config)
    with pytest.raises(ValueError, match="processing_class is None"):
        PreferenceTrainer(world.model, config, make_dataset(True))
    with pytest.raises(ValueError, match="ref_model is the model itself"):
        PreferenceTrainer(world.model, config, make_dataset(True), None, world.tokenizer, world.model)


def test_rows_come_in_every_form_and_give_the_same_ids(world, tmp_path):
    loaded = load_rows(make_rows(True))
    tokenized = tokenize_rows(loaded, world.tokenizer, max_length=96)
    columns = ["prompt_ids", "completion_ids", "label", "group", "row"]
    expected = tokenized.dataset.select_columns(columns).to_list()
    for data in (make_dataset(True), make_rows(True), loaded, tokenized):
        trainer = make_trainer(world, tmp_path, data=data)
        assert trainer.train_dataset.select_columns(columns).to_list() == expected
    other = tokenize_rows(loaded, world.tokenizer, max_length=64)
    with pytest.raises(ValueError, match="tokenised with max_length 64, the configuration says 96"):
        make_trainer(world, tmp_path, data=other)


def test_a_mixture_of_experts_is_told_that_its_balancing_loss_is_left_out(world, tmp_path):
    config = MixtralConfig(
        vocab_size=len(world.tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        router_aux_loss_coef=0.01,
    )
    with pytest.warns(TrainingWarning, match="load-balancing loss is not part of the objective"):
        trainer = make_trainer(world, tmp_path, ref=False, model=AutoModelForCausalLM.from_config(config))
    (log, *_) = train(trainer)
    assert log["loss"] == 0.5 and log["grad_norm"] > 0
