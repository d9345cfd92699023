#include "kernels/weight.h"
