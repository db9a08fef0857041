// Tells PyTorch that there is a device of type CARD (CUDA or MPS): a device guard that guards nothing, the hooks that
// its autograd and generators ask, and generators that say they belong to the card and draw as the CPU's do.
// Compiled by hooks.py and loaded before torch is imported, for torch asks for its hooks only once.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
#define HOOKS JOIN(CARD, HooksInterface)

namespace {

void (*host_waits)() = nullptr;

const c10::Device card(c10::DeviceType::CARD, 0);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return card.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return card; }
  c10::Device getDevice() const override { return card; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, card); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, card); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, card); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeEvent(void*) const override { host_waits(); }
  void synchronizeStream(const c10::Stream&) const override { host_waits(); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct CardGenerator final : at::CPUGeneratorImpl {
  CardGenerator() { device_ = card; }
};

struct JOIN(CARD, Hooks) final : at::HOOKS {
  template <typename... Args>
  explicit JOIN(CARD, Hooks)(Args&&...) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<CardGenerator>(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::make_generator<CardGenerator>();
    return generator;
  }
};

const Guard guard;

// A build of torch with CUDA brings hooks of its own, and a guard that is registered when it is loaded.
using Registry = at::JOIN(Registerer, JOIN(CARD, HooksRegistry));
const Registry hooks_registerer(
    TEXT(JOIN(CARD, Hooks)),
    c10::REGISTRY_PREFERRED,
    at::JOIN(CARD, HooksRegistry)(),
    Registry::DefaultCreator<JOIN(CARD, Hooks)>,
    "the stand-in");

// On a machine with Apple's device there is no CUDA, whatever this build of torch says.
struct NoCUDA final : at::CUDAHooksInterface {
  explicit NoCUDA(at::CUDAHooksArgs) {}
};
const auto no_cuda_registerer = card.is_cuda() ? nullptr
                                               : std::make_unique<at::RegistererCUDAHooksRegistry>(
                                                     "CUDAHooks",
                                                     c10::REGISTRY_PREFERRED,
                                                     at::CUDAHooksRegistry(),
                                                     at::RegistererCUDAHooksRegistry::DefaultCreator<NoCUDA>,
                                                     "the stand-in");

}  // namespace

extern "C" void call_when_the_host_waits(void (*called)()) { host_waits = called; }

extern "C" void register_guard() { c10::impl::DeviceGuardImplRegistrar(card.type(), &guard); }
