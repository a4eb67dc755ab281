"""What docker/build-test builds, runs and looks at, without a docker engine."""
