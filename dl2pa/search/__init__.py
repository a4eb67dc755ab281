"""Search for the best values of configuration keys: journal of the trials, sampler, pruning, results."""
