"""Causal language models, which continue text token by token. Torch is imported only when needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from icmlora.base_models.examples.adapter_template import render_in_child
from icmlora.base_models.examples.chat_template import ChatTemplate, Rendered, Templates
from icmlora.base_models.examples.chats import Chat
from icmlora.base_models.examples.examples import Example, Examples, plain, text_example
from icmlora.base_models.finding.lookup import read_config
from icmlora.base_models.modality import IGNORED, BaseModel, Metric, Modality, Score
from icmlora.errors import DataError
from registry.names import NLL

if TYPE_CHECKING:
    import torch

    from icmlora.base_models.examples.prompts import Prompt
    from icmlora.base_models.finding.lookup import FoundBase
    from icmlora.base_models.kinds.likelihood import Scored

_ENDINGS = ("ForCausalLM", "LMHeadModel")
# Predicts tokens in any order, from both sides, but is not in transformers' table of masked models.
_BOTH_SIDES = frozenset({"xlnet"})
# For tasks without samples: short texts in several genres and languages, written for this project.
# They carry no task information: only the adapted view reads them, where the adapter itself makes the difference.
PROBES: tuple[str, ...] = (
    "The river runs slowly past the old mill before it turns north towards the town. In spring the water rises, "
    "and the children count the stones that are still dry.",
    "To prepare the tea, boil fresh water, warm the pot, add one spoon of leaves for each cup and wait four minutes.",
    "def mean(items):\n    total = 0.0\n    for item in items:\n        total += item\n    return total / len(items)\n",
    "Question: Why does ice float on water?\nAnswer: Ice is less dense than liquid water, because its "
    "molecules are held further apart in the crystal.",
    "Theorem. The sum of two even numbers is even. Proof. Let a = 2m and b = 2n. Then a + b = 2(m + n), which is even.",
    "<ul>\n  <li>Monday: closed</li>\n  <li>Tuesday: 9 to 17</li>\n  <li>Wednesday: 9 to 12</li>\n</ul>\n",
    "SELECT city, COUNT(*) AS visitors FROM visits WHERE year = 2020 GROUP BY city ORDER BY visitors DESC LIMIT 10;",
    "Dear Ms Novak, thank you for your letter of 3 May. The parcel has arrived and we will write again next week.",
    "Der Zug hält an jedem Bahnhof, und an jedem steigen ein paar Leute aus. Am Ende der Strecke ist er fast leer.",
    "La biblioteca abre a las nueve de la mañana. Los sábados hay un taller para niños y la entrada es gratuita.",
    "Le boulanger se lève avant le soleil. Quand les premiers clients arrivent, le pain est encore chaud.",
    "Зимой темнеет рано, и в окнах домов загораются огни. Снег скрипит под ногами, а воздух пахнет дымом.",
    "春天来了，河边的柳树长出了新叶。孩子们在草地上放风筝，老人坐在长椅上聊天。",
    "name,unit,price\napple,kg,2.40\nbread,piece,3.10\nmilk,litre,1.25\n",
    '{"sensor": "north", "readings": [21.5, 21.7, 21.4], "unit": "celsius", "valid": true}',
    "- Well, did you see it?\n- I saw something. A light, then nothing.\n- And you went no closer?\n- Would you have?",
)


class CausalLM(Modality[Any, "Scored"]):
    """Models that `transformers.AutoModelForCausalLM` loads; measured by next-token loss."""

    name = "causal language model"
    metric = Metric(NLL, higher_is_better=False)
    takes_context = True
    probes: Sequence[Example] = plain(PROBES)

    def suits(self, found: FoundBase) -> bool:
        """Return whether `config.json` describes a left-to-right language model."""
        return found.is_gguf or _is_causal(read_config(found.path))

    def load(
        self,
        found: FoundBase,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        fingerprint: str | None = None,
    ) -> BaseModel:
        """Load model and tokenizer, by default on the CPU."""
        from icmlora.base_models.load import base_of, load_network

        return base_of(found, self, partial(load_network, found), device, dtype, fingerprint)

    def example(self, row: Mapping[str, Any]) -> Example | Chat:
        """Read text, prompt and completion, or a chat."""
        return text_example(row)

    def readable(
        self, base: BaseModel, examples: Sequence[Example | Chat], template: Templates | None = None
    ) -> Examples:
        """Render chats with the adapter's own chat template or the base model's; skip chats that it rejects.

        Raises:
            DataError: The adapter's own template needs too much memory or time.
        """
        if not any(isinstance(example, Chat) for example in examples):
            return Examples(tuple(examples))
        of_base = ChatTemplate.of(base.tokenizer)
        chosen = of_base if template is None else ChatTemplate.of(base.tokenizer, template)
        found = [
            # Without a chat template, use the plain form.
            Example(*example.plain) if isinstance(example, Chat) and example.plain and not chosen.is_own else example
            for example in examples
        ]
        chats = [example for example in found if isinstance(example, Chat)]
        # The base model's own template is as trusted as its weights.
        is_trusted = chosen.templates == of_base.templates
        rendered = iter(chosen.render_all(chats) if is_trusted else render_in_child(chosen, chats))
        read = [next(rendered) if isinstance(example, Chat) else example for example in found]
        usable = tuple(example for example in read if not isinstance(example, DataError))
        refused = [example for example in read if isinstance(example, DataError)]
        reason = f"a chat {refused[0].message}" if refused else None
        if not any(isinstance(example, Rendered) for example in usable):
            return Examples(usable, len(refused), reason)
        note = None if chosen.is_own else f"{base.label} has no chat template; chats are read as ChatML"
        return Examples(usable, len(refused), reason, chosen.digest, note)

    def prepare(
        self, base: BaseModel, examples: Sequence[Example | Rendered], limit: int, *, whole: bool = False
    ) -> list[Scored]:
        """Return token ids; score only the completion if there is a prompt, unless `whole` is set."""
        from icmlora.base_models.kinds.likelihood import tokenized

        return tokenized(base.tokenizer, examples, base.within(limit), whole=whole, positions=base.positions)

    def pieces(self, base: BaseModel, item: Scored, limit: int) -> list[Scored]:
        """Split a text into pieces, each with the tokenizer's start token if it has one."""
        from icmlora.base_models.kinds.likelihood import pieces

        return pieces(base.tokenizer, item, base.within(limit))

    def joined(self, base: BaseModel, items: Sequence[Scored], limit: int) -> list[Scored]:
        """Concatenate texts, with chats as rendered by their template."""
        from icmlora.base_models.kinds.likelihood import joined

        return joined(base.tokenizer, items, base.within(limit))

    def states(self, base: BaseModel, examples: Sequence[Example | Rendered], limit: int) -> torch.Tensor:
        """Return the last layer at the last token of each text, (texts, d) in float32."""
        from icmlora.base_models.kinds.hidden_states import last_positions

        return last_positions(base, _texts(examples), base.within(limit))

    def context_state(self, base: BaseModel, examples: Sequence[Example | Rendered], limit: int) -> torch.Tensor:
        """Return the mean of the last layer over one context with all texts concatenated, (d,) in float32."""
        from icmlora.base_models.kinds.hidden_states import mean_over_context

        return mean_over_context(base, _texts(examples), base.within(limit))

    def logits(self, base: BaseModel, items: Sequence[Scored], *, from_leaf: bool = False) -> list[torch.Tensor]:
        """Return next-token logits at every token, (T, vocabulary) per text."""
        from icmlora.base_models.kinds.likelihood import next_token_logits

        return next_token_logits(base, items, from_leaf=from_leaf)

    def wanted(self, item: Scored) -> list[int]:
        """Return the target tokens; the prediction after the last token is not scored."""
        return [*item.targets, IGNORED]

    def answers(self, item: Scored) -> list[bool] | None:
        """Return a mask of the predictions of answer tokens; None for a text without a prompt."""
        return [place + 1 in item.answers for place in range(item.size)] if item.answers else None

    def written(self, base: BaseModel, items: Sequence[Scored], count: int, limit: int, *, seed: int) -> list[Scored]:
        """Return texts that the model samples, starting from the first tokens of the items."""
        from icmlora.base_models.kinds.continuations import continuations

        return continuations(base, items, count, limit, seed=seed)

    def answer(self, base: BaseModel, prompt: Prompt, most: int) -> str:
        """Return the model's continuation of a prompt."""
        from icmlora.base_models.kinds.continuations import answer

        return answer(base, prompt, most)

    def counted(self, base: BaseModel, items: Sequence[Scored]) -> torch.Tensor:
        """Return a mask of the tokens that are not padding, (texts, T)."""
        from icmlora.base_models.kinds.likelihood import padded

        return padded([item.ids for item in items], base.device)[1].bool()

    def measure(self, base: BaseModel, examples: Sequence[Example | Rendered], limit: int) -> Score:
        """Return the loss in nats per token."""
        from icmlora.base_models.kinds.likelihood import nll
        from icmlora.io.devices import texts_at_once

        return nll(
            base.model,
            base.tokenizer,
            examples,
            max_tokens=base.within(limit),
            batch_size=texts_at_once(base.device),
            device=base.device,
            positions=base.positions,
        )


def _is_causal(config: Mapping[str, object]) -> bool:
    """Return whether next-token loss makes sense for a model; True if only loading it can decide."""
    from transformers.models.auto import modeling_auto as tables
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return True  # unknown to transformers, which raises an error on loading
    causal = tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if causal is None or kind in _BOTH_SIDES:
        return False
    named = config.get("architectures")
    architectures = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    known = {causal} if isinstance(causal, str) else set(causal)
    is_named = any(name in known or name.endswith(_ENDINGS) for name in architectures)
    if config.get("is_encoder_decoder") is True and not is_named:
        return False
    if kind in tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        # A causal language model class loads these too, but lets every token attend to later ones.
        return config.get("is_decoder") is True
    return is_named or not architectures


def _texts(examples: Sequence[Example | Rendered]) -> list[str | Rendered]:
    return [example.text if isinstance(example, Example) else example for example in examples]
