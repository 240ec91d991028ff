"""What the page shows of jobs and pictures, as HTML; whatever came from a client is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from core.server.jobs import Job, Status

HEADINGS = {"done": "Done", "cancelled": "Cancelled", "failed": "It did not work"}
TOLD = {
    "prompt": "Prompt", "negative_prompt": "Not in it", "seed": "Seed", "steps": "Steps", "cfg": "cfg",
    "sampler": "Sampler", "control": "Control", "lora": "LoRA", "pretrained_path": "Guidance",
    "strength": "Made anew", "region": "Region",
}  # fmt: skip


def progress(job: Job, place: int) -> str:
    """Where a job stands: its place, a bar for each stage, and the latent as a small picture."""
    status = job.status
    heading = HEADINGS.get(status.state) or _waiting(place, status)
    told = f"<b>{escape(heading)}</b>{_took(status)}"
    parts = [f'<p class="up-state" role="status" data-job="{escape(job.id)}">{told}</p>']
    if status.error:
        parts.append(mistake(status.error))
    parts += [f'<p class="up-note">{escape(note)}</p>' for note in status.notes]
    if not status.over:
        parts += [_bar(bar.name, bar.done, bar.steps) for bar in status.stages]
    if status.preview is not None:
        data = base64.b64encode(status.preview).decode()
        parts.append(f'<img class="up-preview" alt="preview" src="data:image/png;base64,{data}">')
    return "".join(parts)


def _waiting(place: int, status: Status) -> str:
    if status.state == "running":
        return f"Running: {status.doing}" if status.doing else "Running"
    return f"Waiting: {place} before this one" if place else "Waiting"


def _took(status: Status) -> str:
    return f" in {status.seconds:.1f} s" if status.state == "done" else ""


def _bar(name: str, done: int, steps: int) -> str:
    label = escape(name[:1].upper() + name[1:])
    return (
        f'<label class="up-bar"><span>{label}</span><progress max="{steps}" value="{done}"></progress>'
        f"<span>{done} / {steps}</span></label>"
    )


def mistake(message: str) -> str:
    """What is wrong, in a sentence."""
    return f'<p class="up-error" role="alert">{escape(message)}</p>'


def results(names: Sequence[str], seed: int, prompt: str) -> str:
    """Finished pictures, each with a link to its file."""
    cards = [_card(name, f"seed {seed + i}", prompt) for i, name in enumerate(names)]
    return f'<div class="up-results">{"".join(cards)}</div>' if cards else ""


def small_ones(names: Sequence[str], seed: int, prompt: str) -> str:
    """Small pictures, each with a button that asks for the large one."""
    cards = [_card(name, f"seed {seed + i}", prompt, _high(name, seed + i)) for i, name in enumerate(names)]
    return f'<h3>Small pictures</h3><div class="up-results up-low">{"".join(cards)}</div>'


def _high(name: str, seed: int) -> str:
    return (
        f'<button type="button" class="up-high" data-name="{escape(name)}" '
        f'aria-label="Render this one high, seed {seed}">Render this one high</button>'
    )


def _card(name: str, caption: str, alt: str, button: str = "") -> str:
    where = f"pictures/{escape(name)}"
    picture = f'<a href="{where}" target="_blank"><img src="{where}" alt="{escape(alt)}"></a>'
    link = f'<a href="{where}" download="{escape(name)}">Download PNG</a>'
    return f"<figure>{picture}<figcaption>{escape(caption)} · {link}</figcaption>{button}</figure>"


def history(names: Sequence[str]) -> str:
    """Small pictures to pick from."""
    if not names:
        return "<p>No picture was made yet.</p>"
    cards = [
        f'<button type="button" data-name="{escape(name)}" aria-label="picture {escape(name)}">'
        f'<img loading="lazy" alt="" src="pictures/{escape(name)}/small"></button>'
        for name in names
    ]
    return f'<div class="up-history">{"".join(cards)}</div>'


def details(name: str, settings: Mapping[str, Any]) -> str:
    """A picture of the history with what it was made with."""
    told = {name: settings[key] for key, name in TOLD.items() if settings.get(key) not in (None, "", [])}
    small = "a small one for " if settings.get("lr_only") else ""
    told["Size"] = f"{small}{settings.get('width')} × {settings.get('height')}"
    rows = (f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in told.items())
    card = _card(name, name, str(settings.get("prompt", "")))
    return f'<div class="up-results">{card}</div><dl>{"".join(rows)}</dl>'


def note(text: str) -> str:
    """A remark."""
    return f'<p class="up-note">{escape(text)}</p>'
