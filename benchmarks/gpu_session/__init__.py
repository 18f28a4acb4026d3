"""One session on a card that is there for minutes: is the Triton engine right, how fast is it, which tiles are best.

`__main__` is the program and `plan` its order, `session` the parent that never touches the card; `stages` runs one
stage, each in a process of its own. Torch, Triton and pydantic are all that it needs.
"""
