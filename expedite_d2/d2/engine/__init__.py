"""Running models: launching, set-up, training and evaluation."""

from expedite_d2.d2.engine.defaults import build_trained_model, default_setup, setup
from expedite_d2.d2.engine.launch import launch
from expedite_d2.d2.engine.test import do_test
from expedite_d2.d2.engine.train import do_train

__all__ = ["build_trained_model", "default_setup", "do_test", "do_train", "launch", "setup"]
