"""`lowp generate`: continue a prompt with a checkpoint, ours or one in floats, and say how fast.

lowp generate DIR --prompt "The "
lowp generate DIR --prompt "The " --temperature 0.7 --seed 1 --max-new-tokens 100
"""

from __future__ import annotations

from typing import Annotated

import typer

from .app import Device, Directory, Json, print_json, show
from .eval import DtypeOr, load

Prompt = Annotated[str, typer.Option("--prompt", show_default=False, help="What the model goes on from.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="How many tokens to add at most.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 for the most likely token, above 0 to draw.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the draw.")]


def generate(
    directory: Directory,
    prompt: Prompt,
    max_new_tokens: NewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOr = "",
    json: Json = False,
) -> None:
    """Continue a prompt, and report tokens a second."""
    from ..integrations import transformers as hf
    from ..report.continuation import continuation

    tokenizer = hf.tokenizer(directory)
    model = load(directory, device, dtype)
    made = continuation(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if json:
        figures = {"tokens": made.tokens, "seconds": made.seconds, "tokens_per_second": made.rate}
        print_json(
            {"directory": directory, "prompt": prompt, "text": made.text, "seed": seed, "temperature": temperature}
            | figures
        )
        return
    show(_Plain(prompt, made.text), f"\n{made.tokens} tokens in {made.seconds:.2f} s, {made.rate:.1f} a second")


class _Plain:
    """A model's text for the console: never read as markup."""

    def __init__(self, prompt: str, text: str) -> None:
        self.prompt, self.text = prompt, text

    def __rich__(self) -> object:
        from rich.text import Text

        return Text.assemble((self.prompt, "bold"), self.text)


COMMANDS = {"generate": generate}
