"""S3Gen: speech tokens -> encoder -> flow solver -> mel -> vocoder -> audio.

The flow solver has its engine.
"""
