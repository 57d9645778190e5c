"""Generation configs that can be saved with the model."""

import logging

from transformers import GenerationConfig, PreTrainedModel

from prefopt.errors import UserError

logger = logging.getLogger(__name__)


def make_savable(model: PreTrainedModel, name: str) -> None:
    """Set ``do_sample`` where the generation config has sampling values, such as a temperature, without it.

    Published models have such configs, which transformers loads, but does not save after a change of a token id. Their
    authors meant the temperature to be used. A negative padding id, which stands for none, becomes None.

    Args:
        model: about to be trained in all weights, or exported.
        name: of the model, in messages.

    Raises:
        UserError: the config has another contradiction.
    """
    config = model.generation_config
    if config.pad_token_id is not None and config.pad_token_id < 0:
        config.pad_token_id = None
    if _contradiction(config) is None:
        return
    before, config.do_sample = config.do_sample, True
    left = _contradiction(config)
    if left is not None:
        config.do_sample = before
        raise UserError(
            f"the generation config of {name} cannot be saved with the model: {left}; correct its "
            "generation_config.json"
        )
    logger.warning(
        "the generation config of %s has sampling values without do_sample, which cannot be saved; do_sample is now "
        "true",
        name,
    )


def _contradiction(config: GenerationConfig) -> str | None:
    """What transformers would refuse to save the config for, in one line."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None
