#pragma once

#include <nanobind/nanobind.h>

// Adds the choice of tokens to the module.
void bind_sampling(nanobind::module_& module);
