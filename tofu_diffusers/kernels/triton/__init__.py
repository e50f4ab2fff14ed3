"""The fast implementations, one file a kernel; `kernels.reference` defines what each must compute."""
