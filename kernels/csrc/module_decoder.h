#pragma once

#include <nanobind/nanobind.h>

// Adds the products, the decoder and the thread pool to the module.
void bind_decoder(nanobind::module_& module);
