import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two spinning thread pools on two cores are many times slower

from jaxtyping import install_import_hook

install_import_hook("probekit", "typecheck.typechecked")  # shapes and types are checked in the tests only
