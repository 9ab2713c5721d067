"""S3Gen: speech tokens -> encoder -> flow solver -> mel -> vocoder -> audio, for inference."""
