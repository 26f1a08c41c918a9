#pragma once

#include <nanobind/nanobind.h>

// Adds packed weights, and what makes them, to the module.
void bind_weight(nanobind::module_& module);
