#pragma once

#include <nanobind/nanobind.h>

// Adds the single kernels to the module.
void bind_kernels(nanobind::module_& module);
