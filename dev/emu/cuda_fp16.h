// bf16 and half: see half.h
#pragma once
#include <cuda_runtime.h>
