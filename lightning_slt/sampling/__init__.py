"""Chains over the weights of any module: torch, no Trainer."""
