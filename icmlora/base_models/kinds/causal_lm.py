"""Causal language models, which continue text token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from icmlora.base_models.examples.adapter_template import render_in_child
from icmlora.base_models.examples.chat_template import ChatTemplate, Rendered, Templates
from icmlora.base_models.examples.chats import Chat
from icmlora.base_models.examples.context import SEPARATOR
from icmlora.base_models.examples.examples import Example, Examples, plain, text_example
from icmlora.base_models.examples.prompts import Prompt
from icmlora.base_models.finding.lookup import FoundBase, read_config
from icmlora.base_models.kinds import continuations, likelihood
from icmlora.base_models.kinds.auto_model import AutoLoaded
from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import IGNORED, BaseModel, Metric, Score
from icmlora.errors import BaseModelUnsuited, DataError
from icmlora.io.devices import texts_at_once, uploaded
from registry.names import NLL

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


class CausalLM(AutoLoaded):
    """Models that `transformers.AutoModelForCausalLM` loads; measured by next-token loss."""

    name = "causal language model"
    metric = Metric(NLL, higher_is_better=False)
    takes_context = True
    probes: Sequence[Example] = plain(PROBES)
    auto_class = "AutoModelForCausalLM"
    heads = ()

    def suits(self, found: FoundBase) -> bool:
        """Return whether next-token loss makes sense for the model; True if only loading it can decide."""
        if found.is_gguf:
            return True
        config = read_config(found.path)
        kind, named = config.get("model_type"), config.get("architectures")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            return True  # unknown to transformers, which raises an error on loading
        causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
        if causal is None or kind in _BOTH_SIDES:
            return False
        architectures = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
        known = {causal} if isinstance(causal, str) else set(causal)
        is_named = any(name in known or name.endswith(_ENDINGS) for name in architectures)
        if config.get("is_encoder_decoder") is True and not is_named:
            return False
        if kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            # A causal language model class loads these too, but lets every token attend to later ones.
            return config.get("is_decoder") is True
        return is_named or not architectures

    def example(self, row: Mapping[str, Any]) -> Example | Chat:
        return text_example(row)

    def readable(
        self, base: BaseModel, examples: Sequence[Example | Chat], template: Templates | None = None
    ) -> Examples:
        """Render chats with the adapter's own chat template or the base model's; skip chats that it rejects.

        Raises:
            DataError: The adapter's own template needs too much memory or time.
        """
        of_base = ChatTemplate.of(base.tokenizer)
        chosen = of_base if template is None else ChatTemplate.of(base.tokenizer, template)
        # Without a chat template, use the plain form.
        read: list[Any] = [
            Example(*example.plain) if isinstance(example, Chat) and example.plain and not chosen.is_own else example
            for example in examples
        ]
        if chats := [example for example in read if isinstance(example, Chat)]:
            # The base model's own template is as trusted as its weights.
            is_trusted = chosen.templates == of_base.templates
            rendered = iter(chosen.render_all(chats) if is_trusted else render_in_child(chosen, chats))
            read = [next(rendered) if isinstance(example, Chat) else example for example in read]
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
        return likelihood.tokenized(base.tokenizer, examples, base.within(limit), whole=whole, positions=base.positions)

    def pieces(self, base: BaseModel, item: Scored, limit: int) -> list[Scored]:
        return likelihood.pieces(base.tokenizer, item, base.within(limit))

    def joined(self, base: BaseModel, items: Sequence[Scored], limit: int) -> list[Scored]:
        return likelihood.joined(base.tokenizer, items, base.within(limit))

    def states(self, base: BaseModel, examples: Sequence[Example | Rendered], limit: int) -> torch.Tensor:
        """Return the last layer at the last token of each text, (texts, d) in float32."""
        limit = base.within(limit)
        # A chat is read up to the end of its last answer, because the end-of-turn tokens are the same for every task.
        rows = [
            _tokens(base, example.text[: example.stop], limit, special=False)
            if isinstance(example, Rendered)
            else _tokens(base, example.text, limit)
            for example in examples
        ]
        hidden = _last_layer(base, *likelihood.padded(rows, base.device))  # (texts, T, d)
        # Padding is on the right, so a row's last real token is at its length minus one.
        last = uploaded([len(row) - 1 for row in rows], hidden.device)
        return hidden[torch.arange(len(rows), device=hidden.device), last].float()

    def context_state(self, base: BaseModel, examples: Sequence[Example | Rendered], limit: int) -> torch.Tensor:
        """Return the mean of the last layer over one context with the beginning of every text, (d,) in float32."""
        limit = base.within(limit)
        separator = list(base.tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"])
        share = max(1, limit // len(examples) - len(separator))
        packed: list[int] = []
        for number, example in enumerate(examples):
            # A template's text before a chat is the same for every task.
            text = example.text[example.start : example.stop] if isinstance(example, Rendered) else example.text
            # Only the first text may begin with special tokens: later ones would look like a new document.
            packed += (separator if number else []) + _tokens(base, text, share, special=not number)
        ids = uploaded([packed[:limit]], base.device)  # (1, T)
        return _last_layer(base, ids, torch.ones_like(ids))[0].float().mean(dim=0)

    def logits(self, base: BaseModel, items: Sequence[Scored], *, from_leaf: bool = False) -> list[torch.Tensor]:
        return likelihood.next_token_logits(base, items, from_leaf=from_leaf)

    def wanted(self, item: Scored) -> list[int]:
        """Return the target tokens; the prediction after the last token is not scored."""
        return [*item.targets, IGNORED]

    def answers(self, item: Scored) -> list[bool] | None:
        return [place + 1 in item.answers for place in range(item.size)] if item.answers else None

    def written(self, base: BaseModel, items: Sequence[Scored], count: int, limit: int, *, seed: int) -> list[Scored]:
        return continuations.continuations(base, items, count, limit, seed=seed)

    def answer(self, base: BaseModel, prompt: Prompt, most: int) -> str:
        return continuations.answer(base, prompt, most)

    def counted(self, base: BaseModel, items: Sequence[Scored]) -> torch.Tensor:
        return likelihood.padded([item.ids for item in items], base.device)[1].bool()

    def measure(self, base: BaseModel, examples: Sequence[Example | Rendered], limit: int) -> Score:
        return likelihood.nll(
            base.model,
            base.tokenizer,
            examples,
            max_tokens=base.within(limit),
            batch_size=texts_at_once(base.device),
            device=base.device,
            positions=base.positions,
        )


def _tokens(base: BaseModel, text: str, limit: int, *, special: bool = True) -> list[int]:
    ids = list(base.tokenizer(text, truncation=True, max_length=limit, add_special_tokens=special)["input_ids"])
    if not ids:
        raise DataError("a sample has no tokens", hint="remove empty samples")
    return ids


def _last_layer(base: BaseModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the last layer after the final norm, without logits: over a whole vocabulary they cost several layers."""
    model = base.model
    # Llama 4's text model stores its trunk under a different attribute than its class declares.
    for trunk in (model.base_model, model.get_decoder(), getattr(model, "model", None)):
        if trunk is not None and trunk is not model:
            with torch.no_grad():
                hidden: torch.Tensor = trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            return hidden
    raise BaseModelUnsuited(f"icm cannot find the hidden states of base model {base.label!r}")
