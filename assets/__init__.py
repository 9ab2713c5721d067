"""A voice prompt: 7 s of speech sound, 22.05 kHz mono, for demos and tests without a recording.

Spoken by the espeak-ng synthesiser (no person's voice), then compressed without loss:

    espeak-ng -s 160 -v en-us -w voice.wav "The quick brown fox jumps over the lazy dog, while \
seven wizards mix a strange potion by the old bridge."
    sox voice.wav -b 16 -C 8 voice_prompt.flac
"""

from pathlib import Path

VOICE_PROMPT = Path(__file__).parent / "voice_prompt.flac"
