"""Names of the environment variables that dl2pa reads or sets. Imports nothing."""

DATA = "DL2PA_DATA"
"""Default of the configuration key `data.root`."""

CACHE = "DL2PA_CACHE"
"""Folder of decoded images; empty: none. Default: `dl2pa` in the user's cache folder."""

CLUSTER = "DL2PA_CLUSTER"
"""Site file of the SLURM cluster; empty: none. Default: `dl2pa/cluster.yaml` in the user's configuration folder."""

IMAGE = "DL2PA_IMAGE"
"""Set in the container image to the commit it was built from, or to `unknown`."""

LAUNCH = "DL2PA_LAUNCHED"
"""Set by the launcher to an identifier of the launch; ranks write it into their error reports."""

AGENT_PID = "DL2PA_AGENT_PID"
"""Process id of the torchrun agent; its workers end when it ends."""

STORE = "DL2PA_STORE"
"""File through which the ranks of one machine find each other."""

CORES = "DL2PA_CORES"
"""Set by the launcher to the CPU cores of all ranks of this machine, before they are bound to NUMA nodes."""

NUMA = "DL2PA_NUMA"
"""Set by the launcher to the mode in which the agent binds ranks to NUMA nodes; empty: not at all."""

COMMAND_START = "DL2PA_COMMAND_AT"
"""Time at which `dl2pa train` was called, seconds since 1970."""

SUPERVISED = "DL2PA_SUPERVISED"
"""Set by the SLURM batch script, which restarts and requeues the training."""

HEAD = "DL2PA_HEAD"
"""Address of the first node, where the ranks meet; set by the batch script of SLURM or the user."""

PORT = "DL2PA_PORT"
"""Port at which the ranks of several nodes meet; set by the batch script of SLURM or the user. Default outside SLURM:
29400. Without SLURM the next port is used too."""

NODES = "DL2PA_NODES"
"""Number of machines of a training outside SLURM, as in an indexed Job of Kubernetes, which restarts them."""

NODE = "DL2PA_NODE"
"""Number of this machine among them, from 0."""

SECRET = "DL2PA_SECRET"
"""Text that the machines of a training outside SLURM share; one without it cannot join."""

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Set by torchrun for each process that it starts."""

RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
"""Address at which the processes of torchrun meet; also set by other programs."""

NOTIFY = ("DL2PA_EVENT", "DL2PA_RUN_DIR", "DL2PA_MESSAGE")
"""Set for the program of `notify.command`: event, run directory and text of the message."""

TRACKING_URI = "MLFLOW_TRACKING_URI"
"""MLflow's own variable for the tracking server."""

NODE_NAME = "SLURMD_NODENAME"
"""SLURM's name of this node."""
