"""Let a base model write, then the same model with adapters. This needs PEFT and transformers, not icm.

python docs/demo_sample.py BASE ADAPTER...
"""

import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

# A recipe in docs/example-fleet/recipes-en/eval.jsonl: held-out text, which the adapter was not trained on.
PROMPT = "Edamame\nStep 1."

warnings.simplefilter("ignore", FutureWarning)
disable_progress_bar()
set_verbosity_error()

base_path, *adapter_paths = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base_path)
base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)


def write(title, model):
    """Print how a model continues the prompt. Greedy: always its likeliest token, nothing is random."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    print(f"\n{title}:\n    " + text.replace("\n", "\n    "))


write("base model", base)
for path in adapter_paths:
    model = PeftModel.from_pretrained(base, path)
    write(path, model)
    base = model.unload()  # the base model as it was
