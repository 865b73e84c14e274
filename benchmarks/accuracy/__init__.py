"""How good the models are: methods side by side, how the defaults were chosen, and what holds them back."""
