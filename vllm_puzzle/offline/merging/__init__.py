"""Merging two experts of a layer: rules, saliency, alignment, compensation, and the words that they are packed into.

Two experts that share a slot of a packed layer are *mates*.
"""
