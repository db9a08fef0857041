"""Load a base model without its weights to inspect its modules; takes seconds and hardly any memory."""

from __future__ import annotations

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
        named = (getattr(transformers, name, None) for name in config.architectures or ())
        for found_class in named:
            if isinstance(found_class, type) and issubclass(found_class, PreTrainedModel):
                model = found_class(config)
                break
        else:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    return BaseModel(found.label, model, None, "", CausalLM(), 0, 0)
