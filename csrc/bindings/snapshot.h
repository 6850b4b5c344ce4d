// What an optimizer's groups and state held at one moment, for Python.
#pragma once

#include "arguments.h"

namespace looksam {

// Does another tensor share the memory of one of these? A tensor of its own has a storage of its own.
bool any_shared(const Tensors& tensors);

// The first row whose two tensors begin at the same address, or -1.
int first_same_place(const Tensors& tensors, const Tensors& others);

void bind_snapshot(py::module_& module);

}  // namespace looksam
