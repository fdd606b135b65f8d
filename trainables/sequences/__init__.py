"""Parts that sequence models share.

A model of this family ranks by the inner product of a user's vector and an item's. In its file it has a network and a
loss; the rest is here, in the order of a training step. All of it runs on the device of the task's tensors.

views     parts of sequences: one domain's items, the newest ones, padded batches, bags
labels    which items are labels, what is shown before them, and batches of them
losses    drawn negatives, losses, contrasts, a step of the optimiser
blocks    attention, dropout, starts of tables
ranking   scores of all items for the task, and what is kept for serving
"""
