"""T3, text tokens to speech tokens: weights -> prefill -> decode step -> runner."""
