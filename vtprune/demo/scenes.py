# SPDX-License-Identifier: Apache-2.0
"""Pictures and clips of PocketVQA for the demo, with questions whose answers are known."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from PIL import Image

from ..models.pocket import data, worlds
from ..models.pocket.card import MODELS

#: Worlds with one picture.
WORLDS = ("basic", "extended", "clutter", "hires")
#: Numbers of scenes that "make me a scene" draws from.
SCENES = 100_000
CLIP_FRAMES = 16
QUESTIONS = 8


@dataclass(frozen=True)
class Scene:
    """A picture, or the frames of a clip, and what can be asked about it.

    Parameters
    ----------
    name
        World and number: the same name is the same scene.
    frames
        One picture, or those of the clip.
    answers
        The right answer to each question.
    """

    name: str
    frames: tuple[Image.Image, ...]
    answers: dict[str, str]

    @property
    def picture(self) -> Image.Image:
        return self.frames[0]


def worlds_of(model: str) -> tuple[str, ...]:
    """The worlds that an embedded model was trained on; all of them for another model, which may try."""
    known = MODELS[model].worlds if model in MODELS else WORLDS
    return tuple(world for world in WORLDS if world in known)


def draw(world: str, number: int) -> Scene:
    """The scene of that number."""
    found: dict[str, list[data.Question]]
    if world == "basic":
        scene = data.scene("val", number)
        asked = data.questions(scene, limit=QUESTIONS)
    else:
        makers = {
            "extended": (worlds.extended_scene, worlds.extended_candidates),
            "clutter": (worlds.clutter_scene, worlds.clutter_candidates),
            "hires": (worlds.hires_scene, worlds.hires_candidates),
        }
        make, candidates = makers[world]
        scene = make("val", number)
        rng = random.Random(f"{scene.key}/demo")
        found = candidates(scene, rng)
        asked = data.in_turn(rng, found)[:QUESTIONS]
    return Scene(f"{world} {number}", (data.render(scene),), {q.text: q.answer for q in asked})


def clip(number: int) -> Scene:
    """The clip of that number: two frames a second."""
    scenes, asked = worlds.clip("val", number, frames=CLIP_FRAMES)
    frames = tuple(data.render(scene) for scene in scenes)
    return Scene(f"clip {number}", frames, {q.text: q.answer for q in asked[:QUESTIONS]})


def digest(picture: Image.Image) -> str:
    """What tells one picture from another, whatever its file."""
    return hashlib.sha256(repr(picture.size).encode() + picture.convert("RGB").tobytes()).hexdigest()
