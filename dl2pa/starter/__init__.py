"""A first configuration for a folder of images (`dl2pa init`): survey, choice of the network, recipe and file."""
