"""Turns a configuration into a running job: processes on this machine, or a cluster's."""
