#include "record.h"

namespace hne {

Recorder recorder = nullptr;

extern "C" __attribute__((visibility("default"))) void hne_record_launches(Recorder function) { recorder = function; }

}  // namespace hne
