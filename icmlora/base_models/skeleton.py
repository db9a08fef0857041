"""Load a base model without its weights to inspect its modules; takes seconds and hardly any memory."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from icmlora.base_models.finding.lookup import FoundBase
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.load import quiet_loading
from icmlora.base_models.modality import BaseModel
from icmlora.errors import BaseModelNotFound


def load_skeleton(found: FoundBase) -> BaseModel:
    """Build the network of a Hugging Face folder without its weights; raise `BaseModelNotFound` if that fails."""
    if not found.has_config:
        raise BaseModelNotFound("its modules are available only after loading it", path=found.path)
    with quiet_loading(found), torch.device("meta"):
        config = AutoConfig.from_pretrained(found.path, local_files_only=True, trust_remote_code=False)
        model = _network_class(config)(config)
    return BaseModel(found.label, model, None, "", CausalLM(), 0, 0)


def _network_class(config: Any) -> Any:
    """Return the class that the configuration names, or a factory for a causal language model."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return lambda config: AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
