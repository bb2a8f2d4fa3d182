"""How booth-mini, the miniature Stable Diffusion inside the package, is made: data, training, export,
figures.

Nothing in `lora_booth` imports this folder. Words fixed here: an *icon* is one drawing of one *set* (a
vendor's emoji font), rendered once to a 128 px RGBA *master*; a *picture* is a 64 px RGB composition of
icons on a background, together with its caption.
"""
