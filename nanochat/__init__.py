"""The nanochat speedrun fork: pretraining, an inferred horizon, fused kernels."""
