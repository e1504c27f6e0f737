"""Many hospitals on one machine: phantoms, cuts of real sets, engines and pre-training."""
